"""Backends and kernels of installed packages, working and broken ones."""

from __future__ import annotations

import sys

import pytest
import torch

from attention import LayerSpec, UnsupportedError, resolve
from attention.names import registries
from attention.survey import survey
from tests.packages import install

LAYERS = [LayerSpec(i, 4, 2, 8, 8, 0.35) for i in range(2)]
PLACE = {"layers": LAYERS, "device": "cpu", "dtype": torch.float32, "page_size": 16}

MODULE = """
from attention import Backend
from attention.kernels.reference import Reference
from attention.patterns.full import Full

BACKEND = Backend(Full.from_options)
OWN_KERNEL = Backend(Full.from_options, ("exact",))
FAMILY = Backend(Full.from_options, (), "acme:NOTHING")
TEXT = "Full"

def untyped(options):
    raise TypeError("boom")

BROKEN_PATTERN = Backend(untyped)
NO_PATTERN = Backend(dict)

class Exact(Reference):
    name = "exact"

class Misnamed(Reference):
    name = "other"

class Rude(Reference):
    name = "rude"

    def unsupported(self, *_):
        raise RuntimeError("not today")
"""


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """Installs a distribution with these entry points; may be called again for another."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(backends=(), kernels=(), name="acme", module=MODULE):
        groups = {"longspan.backends": dict(backends), "longspan.kernels": dict(kernels)}
        install(tmp_path, name, groups, module)

    yield make
    for module in ("acme", "other_acme"):
        sys.modules.pop(module, None)


def test_one_that_is_installed_meanwhile_is_found(acme):
    """Though a process reads what is installed only once."""
    acme({"early": "acme:BACKEND"})
    assert "early" in registries()[0].names
    acme({"late": "other_acme:BACKEND"}, name="other_acme")
    assert {"early", "late"} <= set(registries()[0].names)


def refusal(backend, kernel="auto", **place):
    with pytest.raises(UnsupportedError) as error:
        resolve(backend, {}, kernel, **PLACE | place)
    return str(error.value)


def verdict(backend):
    (found,) = survey(**PLACE, backend=backend)
    return found


def test_a_backend_without_kernels_of_its_own_has_those_of_sparse(acme):
    acme(backends={"mine": "acme:BACKEND"})
    assert "acme" not in sys.modules
    attention = resolve("mine", {}, "auto", **PLACE)
    assert (attention.backend, attention.pattern.name) == ("mine", "full")
    assert attention.kernel.name == resolve("full", {}, "auto", **PLACE).kernel.name
    assert verdict("mine").origin == "acme 1.0"
    assert verdict("mine").order == verdict_of_sparse().order
    assert " or mine" in refusal("nope")


def verdict_of_sparse():
    return survey(**PLACE, backend="sparse")[0]


def test_a_kernel_works_under_its_backend_and_by_name_under_any(acme):
    acme(backends={"mine": "acme:OWN_KERNEL"}, kernels={"exact": "acme:Exact"})
    assert resolve("mine", {}, "auto", **PLACE).kernel.name == "exact"
    assert resolve("full", {}, "exact", **PLACE).kernel.name == "exact"
    assert resolve("full", {}, "auto", **PLACE).kernel.name != "exact"
    assert verdict("full").kernels["exact"] == []


BROKEN = {
    "gone": ("acme:GONE", "backend gone of acme 1.0 cannot be loaded: AttributeError"),
    "lost": ("acme_lost:BACKEND", "backend lost of acme 1.0 cannot be loaded: ModuleNotFoundError"),
    "text": ("acme:TEXT", "backend text of acme 1.0 is str, not an attention.Backend"),
    "angry": ("acme:BROKEN_PATTERN", "backend angry of acme 1.0 cannot make its pattern: TypeError: boom"),
    "empty": (
        "acme:NO_PATTERN",
        "backend empty of acme 1.0 makes dict, not an attention.patterns.base.Pattern",
    ),
}


def test_a_broken_backend_is_reported_where_it_is_used_and_breaks_nothing_else(acme):
    acme(backends={name: path for name, (path, _) in BROKEN.items()})
    for name, (_, sentence) in BROKEN.items():
        assert refusal(name).startswith(sentence)
        assert refusal(name).endswith("; repair or uninstall that package")
        assert verdict(name).refusal == refusal(name)
        assert verdict(name).auto is None
    assert resolve("full", {}, "auto", **PLACE).backend == "full"
    assert {found.backend for found in survey(**PLACE) if found.refusal} == set(BROKEN)


def test_a_failing_module_is_reported_with_its_error(acme):
    acme(backends={"mine": "acme:BACKEND"}, module="raise OSError('no\\n such library')")
    assert refusal("mine") == (
        "backend mine of acme 1.0 cannot be loaded: OSError: no such library; "
        "repair or uninstall that package"
    )


def test_a_family_that_cannot_be_listed_is_reported(acme):
    acme(backends={"mine": "acme:FAMILY"})
    assert "backend mine of acme 1.0 cannot name its patterns: AttributeError" in verdict("mine").refusal


def test_broken_kernels_are_reported(acme):
    broken = {"rude": "acme:Rude", "misnamed": "acme:Misnamed", "text": "acme:TEXT", "gone": "acme:GONE"}
    acme(backends={"mine": "acme:OWN_KERNEL"}, kernels=broken)
    sentences = {
        "rude": "kernel rude of acme 1.0 failed when asked what it can do: RuntimeError: not today",
        "misnamed": "kernel misnamed of acme 1.0 is not a class derived from attention.kernels.base.Kernel",
        "text": "kernel text cannot be loaded: TypeError",
        "gone": "kernel gone of acme 1.0 cannot be loaded: AttributeError",
    }
    for name, sentence in sentences.items():
        assert sentence in refusal("full", name)
        assert sentence in verdict("full").kernels[name][0]
    assert "there is no attention kernel 'exact'" in refusal("mine")
    assert refusal("mine").endswith("choose attention full")
    assert resolve("full", {}, "auto", **PLACE).backend == "full"


def test_a_name_of_longspans_own_is_refused_by_the_package_that_takes_it(acme):
    acme(backends={"sliding_window": "acme:BACKEND"}, kernels={"sdpa": "acme:Exact"})
    assert refusal("sliding_window") == (
        "backend sliding_window is Longspan's own, but acme 1.0 brings one too; "
        "uninstall that package, or rename what it brings"
    )
    assert "kernel sdpa is Longspan's own, but acme 1.0 brings one too" in refusal("full", "sdpa")
    assert "acme 1.0" in verdict("sliding_window").refusal
    attention = resolve("full", {}, "auto", **PLACE)
    order = verdict("full").order
    if order.index(attention.kernel.name) > order.index("sdpa"):
        assert "acme 1.0" in attention.reason


def test_a_name_of_two_packages_is_refused_by_both(acme):
    acme(backends={"mine": "acme:BACKEND"})
    acme(backends={"mine": "other_acme:BACKEND"}, name="other-acme")
    text = refusal("mine")
    assert "acme 1.0" in text
    assert "other-acme 1.0" in text
    assert "uninstall all but one of these" in text
