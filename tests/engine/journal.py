"""An engine's outputs, kept and compared, for tests of steps that are launched ahead."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from server.engine.core import EngineCore
from server.engine.sequence import Sequence
from server.messages import FinishReason, Sampling, SequenceOutput, Submit
from tests.engine.harness import GREEDY, Outcome, make_core, run

DRAWN = [
    Sampling(seed=3, temperature=0.8),
    GREEDY,
    Sampling(seed=4, top_p=0.9, min_p=0.02, logit_bias={3: 1.0}),
    Sampling(seed=5, top_k=20),
]
PENALIZED = Sampling(seed=6, repetition_penalty=1.3, frequency_penalty=0.4)


def prompts_of(*lengths: int, vocabulary: int = 300) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(4, vocabulary) for _ in range(length)] for length in lengths]


def launched_ahead(core: EngineCore) -> list[int]:
    """Gets the number of sequences of each step that is launched before the one before it is collected."""
    found: list[int] = []
    launch = core.runner.launch

    def watched(scheduled, before=None):
        if before is not None:
            found.append(len(scheduled))
        return launch(scheduled, before)

    core.runner.launch = watched
    return found


class Journal:
    """An engine's outputs, checked for consistency; its pages too, at the end."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.sequences: list[Sequence] = []
        self._aborted: set[int] = set()

    def submit(self, request: Submit) -> None:
        self.core.submit(request)
        self.sequences.append(self.core.scheduler._by_id[request.id])

    def abort(self, sequence_id: int) -> None:
        self.core.abort(sequence_id)
        self._aborted.add(sequence_id)

    def step(self) -> list[SequenceOutput]:
        outputs = self.core.step().sequences
        for item in outputs:
            assert item.id not in self._aborted
            assert item.id not in self.finish
            assert (item.started is None) == (item.id in self.tokens)
            self.tokens.setdefault(item.id, []).extend(item.tokens)
            if item.finish is not None:
                self.finish[item.id] = item.finish
        return outputs

    def drain(self, limit: int = 2000) -> None:
        while self.core.has_work:
            self.step()
            limit -= 1
            assert limit, "the engine does not come to an end"
        assert self.core.kv.pool.held == 0

    def check_published(self) -> None:
        """Every published page must hold the tokens that its key stands for; keys are token ids here."""
        kv, keys = self.core.kv, self.core.runner.cache.layers[0].keys
        known = set()
        for sequence in self.sequences:
            for i, key in enumerate(kv._keys(sequence, sequence.total // kv.page_size)):
                known.add(key)
                page = kv.pool._page_of.get(key)
                if page is not None:
                    expected = sequence.tokens[i * kv.page_size : (i + 1) * kv.page_size]
                    assert keys[page].flatten().tolist() == expected
        assert set(kv.pool._page_of) <= known


class RandomLoad:
    """Requests of every kind, of which some share beginnings, and when each comes or is aborted, in steps.

    Args:
        rng: draws them.
        vocabulary: of the model.
        context: most tokens of a sequence.
        penalized: some have penalties.
    """

    def __init__(self, rng: random.Random, vocabulary: int, context: int, *, penalized: bool) -> None:
        self.requests = []
        for i in range(12):
            length = rng.randint(1, max(1, min(20, context - 2)))
            max_tokens = rng.randint(1, 12)
            forced = rng.choices(range(vocabulary), k=rng.choice([0, 0, 1, min(5, max_tokens), max_tokens]))
            self.requests.append(
                Submit(
                    id=i,
                    prompt=[rng.choice([0, 0, 0, 1]) for _ in range(length)],
                    sampling=rng.choice([GREEDY, Sampling(seed=i, top_p=0.9), *[PENALIZED] * penalized]),
                    max_tokens=max_tokens,
                    forced=forced,
                    min_tokens=rng.randint(0, 3),
                    stop_token_ids=rng.sample(range(vocabulary), rng.choice([0, 1, 3])),
                    priority=rng.randint(0, 1),
                    leader=rng.choice([None, i - 1]),
                )
            )
        self.aborts = {i: rng.randint(0, 25) for i in range(12) if rng.random() < 0.3}
        self.arrivals = {i: rng.randint(0, 20) for i in range(12)}

    def serve(self, core: EngineCore, expected: Mapping[int, Outcome]) -> None:
        """Has an engine compute them; outputs must be those expected, as far as they are not aborted."""
        journal = Journal(core)
        for step in range(30):
            for request in self.requests:
                if self.arrivals[request.id] == step:
                    journal.submit(request)
                if self.aborts.get(request.id) == step and self.arrivals[request.id] < step:
                    journal.abort(request.id)
            if core.has_work:
                journal.step()
        journal.drain()
        for request in self.requests:
            outcome, found = expected[request.id], journal.tokens.get(request.id, [])
            if request.id in self.aborts and request.id not in journal.finish:
                assert found == outcome.tokens[: len(found)]
            else:
                assert (found, journal.finish[request.id]) == (outcome.tokens, outcome.finish)
        journal.check_published()


def told(core: EngineCore, requests: Iterable[Submit]) -> list[list[tuple]]:
    """The outputs of every step but for times."""
    for request in requests:
        core.submit(request)
    outputs = []
    while core.has_work:
        outputs.append(
            [
                (i.id, i.tokens, i.logprobs, i.prompt_logprobs, i.finish, i.cached_tokens)
                for i in core.step().sequences
            ]
        )
    assert core.kv.pool.held == 0
    return outputs


def isolated(loaded, request: Submit, **kwargs) -> tuple[list[int], FinishReason | None]:
    """The output of a sequence without neighbors, prefix cache and steps ahead."""
    outcome = run(make_core(loaded, prefix_cache=False, **kwargs), [request])[request.id]
    return outcome.tokens, outcome.finish
