"""The backend that the documentation shows, installed as its text says, and served."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from attention import LayerSpec, resolve
from attention.kernels.reference import Reference
from attention.kernels.sdpa import Sdpa
from tests.attention.cases import attend, make_case
from tests.e2e.here import serving
from tests.packages import install

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"
LAYERS = [LayerSpec(0, 4, 2, 16, 16, 0.25)]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with the package, installed."""
    section = PAGE.read_text().split("## A backend of your own\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (project,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    folder = tmp_path_factory.mktemp("packages")
    tables = tomllib.loads(project)["project"]
    install(folder, tables["name"], tables["entry-points"], source, tables["version"])
    return folder


@pytest.fixture
def strided(package, monkeypatch):
    monkeypatch.syspath_prepend(package)
    yield lambda **options: resolve("strided", options, "auto", LAYERS, "cpu", torch.float32, 16)
    sys.modules.pop("longspan_strided", None)


@pytest.mark.parametrize(
    "options", [{}, {"window": "5", "stride": "7", "kept": "2"}, {"window": "1", "kept": "0"}]
)
def test_its_ranges_are_its_rule(strided, options):
    pattern = strided(**options).pattern
    positions = torch.arange(700)
    visible = pattern.visible(positions[:, None], positions)
    begins, ends = pattern.spans(positions).unbind(-1)
    counts = torch.zeros(700, 700, dtype=torch.long)
    for begin, end in zip(begins.T, ends.T, strict=True):
        counts += (positions >= begin[:, None]) & (positions < end[:, None])
    assert torch.equal(counts, visible.long())
    assert (begins <= ends).all()
    assert visible.diagonal().all()


def test_kernels_compute_it_without_knowing_it(strided):
    pattern = strided(window="9", stride="8", kept="2").pattern
    case = make_case(LAYERS[0], [(90, 1), (60, 60), (75, 20)], 8, pattern=pattern)
    expected = attend(Reference(), LAYERS[0], case.query, case.cache, case.batch, pattern, None)
    found = attend(Sdpa(), LAYERS[0], case.query, case.cache, case.batch, pattern, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_server_serves_it(strided, tiny_settings):
    options = {"stride": "16", "window": "8"}
    with (
        serving(**tiny_settings, attention="strided", attention_option=options) as server,
        server.client() as client,
    ):
        assert client.generate("hello " * 20, max_tokens=5, ignore_eos=True).usage.completion_tokens == 5
        attention = client.model_info().attention
        assert (attention.backend, attention.pattern) == ("strided", "strided")
        assert attention.options["stride"] == "16"
        assert attention.reason.startswith("first of ")
        identity = next(sample for sample in server.metrics() if sample.startswith("longspan_info"))
        assert 'attention_backend="strided"' in identity
        assert f'kernel="{attention.kernel}"' in identity
        assert f"attention strided, kernel {attention.kernel} ({attention.reason})" in server.log
