"""Every kernel honors every feature of a model's layers under every pattern, or refuses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention import BACKENDS, KERNELS, LayerSpec
from attention.kernels.base import Kernel
from attention.kernels.reference import Reference
from attention.patterns.base import Pattern
from attention.patterns.options import NumberedPattern
from attention.registry import imported
from tests.attention.cases import Case, attend, make_case

PLAIN = LayerSpec(0, 4, 2, 16, 16, 0.25)
FEATURES = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=11),
    "softcap": replace(PLAIN, softcap=0.7),
    "sinks": replace(PLAIN, sinks=True),
    "scale": replace(PLAIN, scale=0.9),
    "other values": replace(PLAIN, value_size=8),
    "one KV head": replace(PLAIN, query_heads=3, kv_heads=1),
    "no groups": replace(PLAIN, kv_heads=4),
    "odd head size": replace(PLAIN, head_size=20, value_size=20),
    "all": LayerSpec(0, 6, 2, 16, 8, 0.4, window=30, softcap=1.5, sinks=True),
}

# Few enough tokens that the small case reaches beyond them; options of other names keep their defaults.
SMALL = {
    "window": "13",
    "sinks": "3",
    "global_tokens": "5",
    "segment": "16",
    "block": "8",
    "window_blocks": "2",
    "random_blocks": "1",
    "budget": "32",
    "recent_pages": "2",
    "dense_layers": "",
}
PAGE = 8
SEQUENCES = [(90, 1), (60, 60), (75, 20), (40, 1)]
PROMPTS = [80, 60, 70, 40]


def patterns() -> dict[str, Pattern]:
    """Every pattern, by its name and each of its options' words."""
    found: dict[str, Pattern] = {}
    for backend, entry in BACKENDS.items():
        members = imported(entry.family) if entry.family else [None]
        for member in members:
            named = {"pattern": member} if member else {}
            make = imported(entry.pattern)
            small = {name: SMALL[name] for name in make(named).options if name in SMALL}
            pattern = make({**named, **small})
            found.setdefault(f"{member or backend}", pattern)
            for name, words in pattern.words.items() if isinstance(pattern, NumberedPattern) else ():
                for word in words[1:]:
                    found[f"{member or backend} {name}={word}"] = make({**named, **small, name: word})
    return found


PATTERNS = patterns()


def case_of(layer: LayerSpec, pattern: Pattern) -> Case:
    return make_case(layer, SEQUENCES, PAGE, pattern=pattern, prompt_lens=PROMPTS)


def compute(kernel: Kernel, case: Case, pattern: Pattern) -> torch.Tensor:
    rerotated = case.query.flip(0) if pattern.rerotated else None
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_feature_is_honored_or_refused(name, pattern):
    kernel: Kernel = imported(KERNELS[name])()
    rule = PATTERNS[pattern]
    for feature, layer in FEATURES.items():
        if reasons := kernel.unsupported([layer], torch.device("cpu"), torch.float32, PAGE, rule):
            assert any(name in reason for reason in reasons), (feature, reasons)
            continue
        case = case_of(layer, rule)
        torch.testing.assert_close(
            compute(kernel, case, rule),
            compute(Reference(), case, rule),
            rtol=1e-5,
            atol=1e-5,
            msg=lambda difference, feature=feature: f"{feature}: {difference}",
        )


@pytest.mark.parametrize("name", KERNELS)
def test_one_layer_that_cannot_be_computed_is_enough(name):
    """A layer that is refused by itself is refused in a model, by its number."""
    kernel: Kernel = imported(KERNELS[name])()
    place = torch.device("cpu"), torch.float32, PAGE, PATTERNS["full"]
    if kernel.unsupported([PLAIN], *place):
        return
    for feature, layer in FEATURES.items():
        if kernel.unsupported([layer], *place):
            model = [replace(PLAIN, index=index) for index in range(7)]
            model[5] = replace(layer, index=5)
            reasons = kernel.unsupported(model, *place)
            assert reasons, feature
            assert all("layer 5" in reason for reason in reasons), reasons


@pytest.mark.parametrize("feature", ["window", "softcap", "sinks", "scale"])
def test_the_case_would_show_a_feature_that_is_lost(feature):
    layer = FEATURES[feature]
    case = case_of(layer, PATTERNS["full"])
    honored = compute(Reference(), case, PATTERNS["full"])
    case.layer, case.sinks = PLAIN, None
    assert not torch.allclose(honored, compute(Reference(), case, PATTERNS["full"]), atol=1e-2)


@pytest.mark.parametrize("pattern", [name for name, rule in PATTERNS.items() if not rule.dense])
def test_the_case_would_show_a_pattern_that_is_lost(pattern):
    case = case_of(PLAIN, PATTERNS[pattern])
    everything = compute(Reference(), case, PATTERNS["full"])
    assert not torch.allclose(compute(Reference(), case, PATTERNS[pattern]), everything, atol=1e-2)


def test_plain_layers_need_no_oracle():
    """The test above would pass if every kernel refused everything."""
    place = torch.device("cpu"), torch.float32, PAGE
    for name, rule in PATTERNS.items():
        kernels = [imported(path)() for path in KERNELS.values()]
        able = [kernel.name for kernel in kernels if not kernel.unsupported([PLAIN], *place, rule)]
        assert "reference" in able
        assert rule.rerotated or len(able) > 1, name
