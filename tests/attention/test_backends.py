from __future__ import annotations

import pytest
import torch

from attention import LayerSpec, UnsupportedError, resolve

PLAIN = [LayerSpec(i, 4, 2, 8, 8, 0.35) for i in range(4)]
CAPPED = [LayerSpec(i, 4, 2, 8, 8, 0.35, softcap=50.0) for i in range(4)]
SINKS = [LayerSpec(i, 4, 2, 8, 8, 0.35, sinks=i != 2) for i in range(4)]


def choose(layers=PLAIN, *, backend="full", options=None, kernel="auto", dtype=torch.float32):
    return resolve(backend, options or {}, kernel, layers, torch.device("cpu"), dtype, 16)


def test_auto_takes_the_first_kernel_that_can():
    attention = choose()
    assert (attention.backend, attention.pattern.name, attention.kernel.name) == ("full", "full", "sdpa")
    assert attention.reason == "first of sdpa, reference that can"
    assert attention.options == {}


def test_auto_says_what_the_first_kernels_lack():
    attention = choose(CAPPED)
    assert attention.kernel.name == "reference"
    assert attention.reason == "sdpa lacks soft-capping (layers 0-3)"
    assert choose(SINKS).reason == "sdpa lacks learned sinks (layers 0-1, 3)"


def test_a_kernel_by_name():
    attention = choose(kernel="reference")
    assert (attention.kernel.name, attention.reason) == ("reference", "asked for")


def test_all_reasons_and_the_nearest_choice_are_named():
    layers = [LayerSpec(0, 4, 2, 8, 8, 0.35, softcap=5.0, sinks=True)]
    with pytest.raises(UnsupportedError) as error:
        choose(layers, kernel="sdpa", dtype=torch.float64)
    assert str(error.value) == (
        "sdpa lacks soft-capping (layer 0); sdpa lacks learned sinks (layer 0); "
        "sdpa computes in float32, bfloat16 or float16, not float64; choose kernel reference or auto"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"backend": "ful"},
            "there is no attention backend 'ful'; choose full or sliding_window or sparse; did you mean ",
        ),
        ({"kernel": "spda"}, "there is no attention kernel 'spda'; choose auto or sdpa or reference"),
        ({"options": {"window": "4", "a": "b"}}, "full attention takes no options; remove a, window"),
    ],
)
def test_unknown_names_are_refused(arguments, sentence):
    with pytest.raises(UnsupportedError) as error:
        choose(**arguments)
    assert str(error.value).startswith(sentence)
