"""The samples of a request: one prefill, and the tokens that each has alone."""

from __future__ import annotations

import functools

import msgspec
import pytest
import torch

from attention.cache import PagedCache
from attention.types import LayerSpec
from server.engine.kv_manager import KVManager
from server.engine.scheduler import Scheduler
from server.messages import Sampling, Submit
from tests.engine import pretended
from tests.engine.harness import make_core, run
from tests.engine.journal import prompts_of

PAGE, SAMPLES, MOST = 8, 4, 10
(PROMPT,) = prompts_of(45)
WINDOW = {"backend": "sliding_window", "options": {"window": "12", "sinks": "4"}}
TOPK = {"backend": "sparse", "options": {"pattern": "topk", "budget": "16", "recent_pages": "2"}}


@pytest.fixture(scope="module")
def alone(llama):
    """What each sample outputs without the others, by a backend and its options."""

    @functools.cache
    def of(backend, options):
        core = make_core(llama, page_size=PAGE, prefix_cache=False, backend=backend, options=dict(options))
        requests = [msgspec.structs.replace(one, leader=None) for one in samples()]
        return [run(core, [request])[request.id].tokens for request in requests]

    return lambda backend="full", options=(), **_: of(backend, tuple(dict(options).items()))


def samples(first_id=1, **more):
    return [
        Submit(
            id=first_id + i,
            prompt=PROMPT,
            sampling=Sampling(seed=i, temperature=0.9),
            max_tokens=MOST,
            leader=first_id if i else None,
            **more,
        )
        for i in range(SAMPLES)
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"ahead": True}, {"max_batch_tokens": 16, "max_running": 16}, {"max_running": 3}, WINDOW, TOPK],
    ids=["together", "launched ahead", "in chunks", "not all at once", "a window", "top-k"],
)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_prompt_is_computed_once_for_all_samples(llama, alone, settings, prefix_cache):
    core = make_core(llama, page_size=PAGE, prefix_cache=prefix_cache, **settings)
    computed = []
    launch = core.runner.launch

    def counted(scheduled, before=None):
        # Of each sequence its tokens of the prompt.
        parts = [min(n, max(0, s.prompt_len - s.computed)) for s, n in scheduled]
        computed.append(sum(parts))
        return launch(scheduled, before)

    core.runner.launch = counted
    outcomes = run(core, samples())
    # The last one again for each of the others.
    assert sum(computed) == len(PROMPT) + SAMPLES - 1
    assert [outcomes[one.id].tokens for one in samples()] == alone(**settings)
    assert len({tuple(outcome.tokens) for outcome in outcomes.values()}) == SAMPLES


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_that_give_way_begin_again(llama, alone, prefix_cache):
    core = make_core(llama, page_size=PAGE, pages=18, prefix_cache=prefix_cache)
    outcomes = run(core, [*samples(), *samples(11, salt=b"other")])
    assert any(outcome.preemptions for outcome in outcomes.values())
    for first_id in (1, 11):
        assert [outcomes[one.id].tokens for one in samples(first_id)] == alone()


@pytest.mark.parametrize("on_host", [True, False])
def test_a_sample_copies_a_page_that_is_a_copy_of_the_same_step(on_host):
    """Its giver entered in a step that was not launched, since it got stuck later."""
    scheduler = Scheduler(KVManager(8, 4, prefix_cache=False), max_running=3, max_batch_tokens=64)

    def ask(name, tokens, **more):
        prompt = [name // 10] * tokens
        scheduler.add(Submit(id=name, prompt=prompt, sampling=Sampling(), max_tokens=9, **more))

    ask(11, 5, priority=-1)
    pretended.step(scheduler)
    ask(1, 6)
    pretended.step(scheduler)
    ask(2, 6, leader=1)
    ask(3, 6, leader=1)
    ask(21, 5)
    assert not scheduler.schedule_ahead(set())
    written = scheduler._by_id[1].pages[1]
    scheduler.remove(1)
    scheduler.schedule()
    cache = PagedCache([LayerSpec(0, 1, 1, 16, 16, 1.0)], 8, 4, torch.float32)
    keys = cache.layers[0].keys
    keys.copy_(torch.arange(8.0).view(8, 1, 1, 1).expand_as(keys))
    if not on_host:
        cache._on_host = []
    cache.copy(scheduler.kv.take_copies())
    samples = [scheduler._by_id[name].pages[1] for name in (2, 3)]
    assert keys[samples].eq(written).all()
