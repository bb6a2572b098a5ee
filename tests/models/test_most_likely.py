"""The most likely tokens, found while the output layer is computed, are those of its logits."""

import numpy as np
import pytest
import torch

from server.messages import Sampling, Submit
from server.models.executors.native import NativeExecutor
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, run
from server.models.quantized.packing import pack
from tests.engine.harness import GREEDY, greedy_requests, load, make_core
from tests.engine.harness import run as run_core
from tests.instructions import at, every_level
from tests.models_zoo import VOCABULARY, save_tiny

INPUTS = 96


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def most_likely(linear, x):
    """By the operator; poisoned before."""
    tokens = torch.full((len(x),), -77)
    run((Stage * 1)(linear.stage(input=x.data_ptr(), likely=tokens.data_ptr())), len(x))
    return tokens.tolist()


def by_definition(logits):
    """The first of the largest; -1 with NaN, or where the largest is infinite."""
    found = logits.numpy().argmax(-1)
    return [int(i) if np.isfinite(row[i]) else -1 for i, row in zip(found, logits.numpy(), strict=True)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_level
def test_they_are_those_of_the_logits(level, threads):
    with at(level):
        for bits, outputs, bias in ((4, 16, False), (8, 1600, False), (8, 1607, True), (4, 5, True)):
            shift = 3 * random(outputs, seed=2) if bias else None
            linear = QuantizedLinear(pack(random(outputs, INPUTS, seed=1), bits), INPUTS, outputs, shift)
            # Around what a thread prepares by itself, tiles, many rows, unpacked panels and chunks.
            for rows in (1, 2, 3, 8, 17, 32, 50, 300):
                x = random(rows, INPUTS, seed=rows)
                threads(1 + rows % 3)
                assert most_likely(linear, x) == by_definition(linear(x)), (bits, outputs, rows)


@every_level
def test_of_equal_logits_the_first_counts_and_nan_is_told(level, threads):
    outputs, count = 20 * 16, 40
    weight = random(16, INPUTS).repeat(outputs // 16, 1)  # every logit 20 times
    weight[-16:] *= 0.5
    linear = QuantizedLinear(pack(weight, 8), INPUTS, outputs, None)
    x = random(count, INPUTS, seed=5)
    x[3, 7] = float("nan")
    x[9] = 0  # all are equal
    x[11] *= float("inf")
    for number in (1, 3):
        threads(number)
        with at(level):
            found, expected = most_likely(linear, x), by_definition(linear(x))
        assert found == expected
        assert found[3] == found[11] == -1
        assert found[9] == 0
        assert max(found) < 16
    bias = torch.full((outputs,), -float("inf"))
    barred = QuantizedLinear(pack(weight, 8), INPUTS, outputs, bias)
    bias[17] = float("inf")
    unbounded = QuantizedLinear(pack(weight, 8), INPUTS, outputs, bias)
    assert most_likely(barred, x[:2]) == most_likely(unbounded, x[:2]) == [-1, -1]


def test_an_engine_gives_the_same_tokens(tmp_path, monkeypatch):
    """Beside rows that ask for more than the most likely token, logits are computed."""
    loaded = load(save_tiny("llama", tmp_path), weights="int8")
    prompts = [random(n, seed=n).mul(1000).long().remainder(VOCABULARY).tolist() for n in (1, 9, 30)]
    calls = []
    found = NativeExecutor.most_likely

    def counted(self, step):
        calls.append(len(step.counts))
        return found(self, step)

    monkeypatch.setattr(NativeExecutor, "most_likely", counted)

    def outputs(*further):
        calls.clear()
        return run_core(make_core(loaded), [*greedy_requests(prompts, 12), *further])

    plain = outputs()
    assert calls == [3] * 11  # all steps but the prompts'
    extras = {
        "drawn": {"sampling": Sampling(temperature=0.8, seed=3)},
        "biased": {"sampling": Sampling(temperature=0.0, logit_bias={plain[1].tokens[0]: -100.0})},
        "penalized": {"sampling": Sampling(temperature=0.0, repetition_penalty=1.5)},
        "must not end": {"sampling": GREEDY, "min_tokens": 6, "stop_token_ids": [plain[1].tokens[2]]},
        "forced": {"sampling": GREEDY, "forced": [5, 6, 7]},
        "log probabilities": {"sampling": GREEDY, "logprobs": 1},
    }
    beside = {}
    for name, more in extras.items():
        beside[name] = outputs(Submit(id=9, prompt=prompts[0], max_tokens=6, **more))
        assert calls.count(3) + calls.count(4) < 11, name
        assert [beside[name][i].tokens for i in (1, 2, 3)] == [plain[i].tokens for i in (1, 2, 3)], name
    monkeypatch.setattr(NativeExecutor, "most_likely", lambda self, step: None)
    assert outputs() == plain
    for name, more in extras.items():
        assert outputs(Submit(id=9, prompt=prompts[0], max_tokens=6, **more)) == beside[name], name
