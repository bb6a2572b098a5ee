"""The kernel choice, refusals, and the alternatives that a refusal names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attention import BACKENDS, KERNELS, Backend, LayerSpec, UnsupportedError, resolve
from attention.kernel_choice import KernelChoice, Place
from attention.kernels.reference import Reference
from attention.names import registries
from attention.patterns.declared import SPARSE
from attention.patterns.full import Full
from attention.patterns.sparse import PATTERNS
from attention.registry import imported
from attention.survey import survey

PLAIN = [LayerSpec(i, 4, 2, 8, 8, 0.35) for i in range(4)]
CAPPED = [LayerSpec(i, 4, 2, 8, 8, 0.35, softcap=50.0) for i in range(4)]
SINKS = [LayerSpec(i, 4, 2, 8, 8, 0.35, sinks=i != 2) for i in range(4)]


class Picky(Reference):
    """Stands in for a kernel of a GPU package: pages of 256 tokens, bfloat16, heads of whole eights."""

    name = "picky"

    def unsupported(self, layers, device, dtype, page_size, pattern):
        reasons = []
        if page_size % 256:
            reasons.append(f"picky needs pages of whole 256 tokens, not {page_size}")
        if dtype != torch.bfloat16:
            reasons.append("picky computes in bfloat16 only")
        if layers[0].head_size % 8:
            reasons.append("picky needs heads of whole eights (all layers)")
        return reasons


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """Installed packages do not matter here, and looking for them takes time."""
    monkeypatch.setattr("attention.registry.entry_points", lambda group: ())


@pytest.fixture
def picky(monkeypatch):
    """Two backends that all compute full attention: one with only the kernel picky, one with sdpa too."""
    monkeypatch.setitem(KERNELS, "picky", Picky)
    monkeypatch.setitem(BACKENDS, "picky_only", Backend(Full.from_options, ("picky",)))
    monkeypatch.setitem(BACKENDS, "picky_first", Backend(Full.from_options, ("picky", "sdpa")))


def choose(layers=PLAIN, *, backend="full", options=None, kernel="auto", dtype=torch.float32, page_size=16):
    return resolve(backend, options or {}, kernel, layers, torch.device("cpu"), dtype, page_size)


def refusal(**arguments):
    with pytest.raises(UnsupportedError) as error:
        choose(**arguments)
    return str(error.value)


def test_auto_takes_the_first_kernel_that_can():
    attention = choose()
    order = BACKENDS["full"].kernels
    assert (attention.backend, attention.pattern.name) == ("full", "full")
    assert attention.reason.startswith(f"first of {', '.join(order)} that can")
    assert attention.kernel.name in order[: order.index("reference")]
    assert attention.options == {}


def test_auto_says_what_the_first_kernels_lack(picky, monkeypatch):
    monkeypatch.setitem(BACKENDS, "full", BACKENDS["full"]._replace(kernels=("sdpa", "reference")))
    attention = choose(backend="picky_first")
    assert attention.kernel.name == "sdpa"
    assert attention.reason == (
        "first of picky, sdpa that can: picky needs pages of whole 256 tokens, not 16; "
        "picky computes in bfloat16 only"
    )
    assert "sdpa lacks soft-capping (layers 0-3)" in choose(CAPPED).reason
    assert "sdpa lacks learned sinks (layers 0-1, 3)" in choose(SINKS).reason


def test_a_kernel_by_name():
    attention = choose(kernel="reference")
    assert (attention.kernel.name, attention.reason) == ("reference", "asked for")


def test_another_kernel_of_the_same_backend_is_nearest(monkeypatch):
    monkeypatch.setitem(BACKENDS, "full", BACKENDS["full"]._replace(kernels=("sdpa", "reference")))
    layers = [LayerSpec(0, 4, 2, 8, 8, 0.35, softcap=5.0, sinks=True)]
    assert refusal(layers=layers, kernel="sdpa", dtype=torch.float64) == (
        "sdpa lacks soft-capping (layer 0); sdpa lacks learned sinks (layer 0); "
        "sdpa reads float32, bfloat16, float16 or float8_e4m3, not float64; choose kernel reference or auto"
    )


def test_a_change_of_settings_is_nearest_where_no_other_kernel_can(picky):
    assert refusal(backend="picky_only") == (
        "no kernel can compute picky_only attention here: picky needs pages of whole 256 tokens, not 16; "
        "picky computes in bfloat16 only; choose page size 256 and kv dtype bfloat16 for kernel picky"
    )
    named = refusal(backend="picky_only", kernel="picky", dtype=torch.bfloat16, page_size=700)
    assert named.endswith("choose page size 512 for kernel picky")
    assert refusal(backend="picky_only", page_size=256).endswith("choose kv dtype bfloat16 for kernel picky")


def test_a_refused_kernel_by_name_gets_both_alternatives(picky):
    assert refusal(backend="picky_first", kernel="picky", dtype=torch.bfloat16).endswith(
        "choose kernel sdpa or auto, or page size 256 for kernel picky"
    )


def test_another_backend_is_nearest_where_nothing_else_can(picky):
    odd = [LayerSpec(0, 4, 2, 9, 9, 0.35)]
    assert refusal(layers=odd, backend="picky_only").endswith(
        "picky needs heads of whole eights (all layers); choose attention full"
    )


def test_dense_layers_need_the_kernel_for_full_attention(monkeypatch):
    class Windowed(Reference):
        name = "windowed"

        def unsupported(self, layers, device, dtype, page_size, pattern):
            return [f"windowed cannot compute {pattern.name}"] if pattern.dense else []

    monkeypatch.setitem(KERNELS, "windowed", Windowed)
    monkeypatch.setitem(
        BACKENDS, "sliding_window", BACKENDS["sliding_window"]._replace(kernels=("windowed", "reference"))
    )
    assert choose(backend="sliding_window").kernel.name == "windowed"
    some = choose(backend="sliding_window", options={"dense_layers": "1"})
    assert some.kernel.name == "reference"
    assert "windowed cannot compute full" in some.reason


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"backend": "ful"}, "there is no attention backend 'ful'; choose full or "),
        ({"backend": "ful"}, "; did you mean full?"),
        ({"kernel": "spda"}, "there is no attention kernel 'spda'; choose auto or "),
        ({"options": {"window": "4", "a": "b"}}, "full attention takes no options; remove a, window"),
        (
            {"backend": "sliding_window", "options": {"dense_layers": "1,9"}},
            "dense_layers names layer 9, but the model's layers are 0 to 3; choose among these",
        ),
    ],
)
def test_unknown_names_are_refused(arguments, sentence):
    assert sentence in refusal(**arguments)


def test_a_kernel_of_other_backends_is_refused_by_their_names(picky):
    text = refusal(kernel="picky")
    assert text.startswith("kernel picky does not compute full attention; choose kernel auto or ")
    assert text.endswith(" or attention picky_only or attention picky_first")


def test_the_options_in_force_give_the_same_again():
    verdicts = [verdict for verdict in survey(PLAIN, "cpu", torch.float32, 16) if verdict.auto]
    assert {verdict.backend for verdict in verdicts} >= {"full", "sliding_window", "sparse"}
    for verdict in verdicts:
        attention = choose(backend=verdict.backend, options=verdict.options)
        assert attention.options == verdict.options
        assert verdict.options.get("pattern", attention.pattern.name) == attention.pattern.name


FEATURES = {
    "plain": PLAIN,
    "soft-capped": CAPPED,
    "sinks": SINKS,
    "window": [LayerSpec(i, 4, 2, 64, 64, 0.35, window=100 if i else None) for i in range(4)],
    "odd heads": [LayerSpec(i, 3, 1, 7, 5, 0.35) for i in range(4)],
    "large heads": [LayerSpec(i, 4, 2, 512, 512, 0.35) for i in range(4)],
}


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("layers", FEATURES.values(), ids=FEATURES)
def test_everything_is_accepted_or_refused_with_all_reasons_and_a_way_that_works(layers, device):
    for dtype in (torch.float32, torch.bfloat16):
        for page_size in (1, 16, 256):
            place = Place(layers, torch.device(device), dtype, page_size)
            for verdict in survey(*place):
                assert verdict.refusal is None, verdict
                for kernel, reasons in verdict.kernels.items():
                    if not reasons:
                        found = resolve(verdict.backend, verdict.options, kernel, *place)
                        assert found.kernel.name == kernel
                        continue
                    with pytest.raises(UnsupportedError) as error:
                        resolve(verdict.backend, verdict.options, kernel, *place)
                    for reason in reasons:
                        assert reason in str(error.value)
                    try_ways(str(error.value), verdict, kernel, place)
                if verdict.auto is None:
                    with pytest.raises(UnsupportedError) as error:
                        resolve(verdict.backend, verdict.options, "auto", *place)
                    for reason in [reason for reasons in verdict.kernels.values() for reason in reasons]:
                        assert reason in str(error.value)
                    try_ways(str(error.value), verdict, "auto", place)


def try_ways(sentence: str, verdict, kernel: str, place: Place) -> None:
    """Does what a refusal says; every way that it names must work."""
    backend, options = verdict.backend, verdict.options
    ways = sentence.rpartition("; choose ")[2]
    assert ways != sentence, sentence
    other = re.search(r"^kernel (\w+) or auto", ways)
    if other:
        assert resolve(backend, options, other[1], *place).kernel.name == other[1]
        resolve(backend, options, "auto", *place)
    if attention := re.search(r"attention (\w+)", ways):
        assert attention[1] != backend
        resolve(attention[1], {}, "auto", *place)
    size, dtype = re.search(r"page size (\d+)", ways), re.search(r"kv dtype (\w+)", ways)
    if size or dtype:
        moved = place
        moved = moved._replace(page_size=int(size[1])) if size else moved
        moved = moved._replace(dtype=getattr(torch, dtype[1])) if dtype else moved
        named = re.search(r"for kernel (\w+)", ways)[1]
        assert kernel in ("auto", named)
        resolve(backend, options, named, *moved)
    assert other or attention or size or dtype, sentence


def test_a_kernel_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setitem(KERNELS, "gone", "attention.kernels.gone:Gone")
    monkeypatch.setitem(BACKENDS, "full", Backend(Full.from_options, ("gone", "sdpa")))
    attention = choose()
    assert attention.kernel.name == "sdpa"
    assert "kernel gone cannot be loaded: ModuleNotFoundError: No module named" in attention.reason
    assert "cannot be loaded" in refusal(kernel="gone")


def test_every_name_leads_somewhere():
    for registry in registries():
        for name in registry.names:
            registry.load(name)
    place = Place(PLAIN, torch.device("cpu"), torch.float32, 16)
    for name, path in KERNELS.items():
        assert any(name in backend.kernels for backend in BACKENDS.values()), path
    for name, backend in BACKENDS.items():
        options = {"pattern": "longformer"} if backend.family else {}
        choice = KernelChoice(*registries(), name, options, place)
        assert all(choice.kernel(kernel).name == kernel for kernel in choice.order)


@pytest.mark.parametrize(
    "options",
    [{}, {"windo": "1"}, {"window": "0"}, {"dense_layers": "x"}, {"prefill": "no"}, {"buckets": "3"}],
    ids=str,
)
def test_options_are_read_alike_with_torch_and_without(options):
    assert list(PATTERNS) == list(SPARSE)
    names = [(name, {}) for name, entry in BACKENDS.items() if not entry.family]
    names += [("sparse", {"pattern": name}) for name in (*PATTERNS, "none")]
    for backend, member in [*names, ("sparse", {})]:
        said = []
        for make in (BACKENDS[backend].pattern, BACKENDS[backend].read):
            try:
                imported(make)({**member, **options})
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]


def test_the_docs_have_every_name_option_default_and_order():
    page = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    backends, kernels, orders = (
        {row[0]: row[1:] for line in table.splitlines()[2:] for row in [line.strip("| ").split(" | ")]}
        for table in tables
    )
    for verdict in survey(PLAIN, "cpu", torch.float32, 16):
        options = {name: value for name, value in verdict.options.items() if name != "dense_layers"}
        pattern = options.pop("pattern", None)
        row = backends.pop(f"`{verdict.backend}`" + (f", `pattern={pattern}`" if pattern else ""))
        assert row[1] == (" ".join(f"`{name}={value}`" for name, value in options.items()) or "none")
        assert orders[f"`{verdict.backend}`"] == [", ".join(f"`{kernel}`" for kernel in verdict.order)]
    assert not backends
    assert {f"`{kernel}`" for kernel in KERNELS} == set(kernels)
