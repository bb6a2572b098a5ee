"""The example of the ready line: the default model answers it rightly, with the sampling that is in force."""

import msgspec
import pytest

from server.engine.build import build_engine
from server.messages import Sampling, Submit
from server.models import default
from server.ready_lines import EXAMPLE
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.engine.harness import run

ANSWER = "The capital of Japan is Tokyo.<|im_end|>"
PATTERNS = ("longformer", "segment", "bigbird", "topk", "lsh", "oracle")
BACKENDS = [("full", {}), ("sliding_window", {}), *(("sparse", {"pattern": name}) for name in PATTERNS)]
CASES = [
    (backend, options, kernel, weights)
    for backend, options in BACKENDS
    for kernel in ("cpu_paged", "sdpa", "reference")
    for weights in ("auto", "float")
]
# xformers has no kernel for a CPU.
CASES += [
    ("flash", {}, kernel, weights) for kernel in ("auto", "sdpa_flash") for weights in ("auto", "float")
]
# At temperature 0.2 and top-p 0.9 a runner-up whose log probability is less by this is never drawn.
CERTAIN = 0.44


def answers(folder, seeds, backend, options, kernel, weights):
    """Texts, and by how much each token was likelier than the next best, of all that there is the least."""
    settings = Settings(
        attention=backend, attention_option=options, kernel=kernel, weights=weights, kv_memory="64MiB"
    )
    core, _ = build_engine(settings, folder, lambda stage, fraction: None)
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode_chat([{"role": "user", "content": EXAMPLE}])
    end = tokenizer.token_id(tokenizer.eos_token)
    requests = [
        Submit(
            id=seed,
            prompt=prompt,
            sampling=msgspec.structs.replace(Sampling(seed=seed), **default.SAMPLING),
            max_tokens=20,
            stop_token_ids=[end],
            logprobs=2,
        )
        for seed in seeds
    ]
    outcomes = run(core, requests).values()
    texts = [tokenizer.decode(outcome.tokens, skip_special_tokens=False) for outcome in outcomes]
    margins = [
        entry.top[0].logprob - entry.top[1].logprob for outcome in outcomes for entry in outcome.logprobs
    ]
    return texts, min(margins)


@pytest.mark.parametrize(
    "case",
    [
        ("full", {}, "auto", "auto"),
        pytest.param(("sparse", {"pattern": "topk"}, "auto", "auto"), marks=pytest.mark.stress),
        pytest.param(("full", {}, "auto", "int8"), marks=pytest.mark.stress),
        *(pytest.param(case, marks=pytest.mark.stress) for case in CASES),
    ],
    ids=str,
)
def test_it_is_right_in_all_calls_and_no_near_tie(case, default_model):
    texts, margin = answers(default_model, range(1, 21), *case)
    assert texts == [ANSWER] * 20
    assert margin > 1.5 * CERTAIN
