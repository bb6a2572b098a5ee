"""Settings of Ray Serve: each that has no meaning is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from server.api.shown import shown
from server.cli.serve import _with_ray
from server.errors import RefusedError
from server.ray import machine
from server.ray.machine import with_memory, with_threads
from server.ray.refusing import _REFUSED, refusal, unheeded
from server.settings import Settings
from tests.cli.test_serve_options import VALUES


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_settings_that_rays_proxy_has_no_place_for_are_refused(name: str) -> None:
    given: Any = {name: VALUES[name][1]}
    assert refusal(Settings(**given)) is None
    assert f"--{name.replace('_', '-')} does not go with --ray: " in (
        refusal(Settings(ray=True, **given)) or ""
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"ray_replicas": 2}, "--ray-replicas has no meaning without --ray"),
        ({"ray_model": {"a": "b"}}, "--ray-model has no meaning without --ray"),
        ({"ray": True, "ray_replicas": 3, "ray_max_replicas": 2}, "--ray-max-replicas 2 is less than"),
        ({"ray": True, "max_request_bytes": 65 << 20}, "no message of more than 64 MiB"),
        ({"ray": True, "ray_loaded_models": 2}, "no further model is named"),
        (
            {"ray": True, "ray_replicas": 2, "ray_target_requests": 4},
            "the number of replicas is fixed; raise",
        ),
        ({"ray": True, "host": "0.0.0.0"}, "speaks no TLS; listen on 127.0.0.1, or say --insecure"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], sentence: str) -> None:
    assert sentence in (refusal(Settings(**given)) or "")


@pytest.mark.parametrize("name", ["host", "port", "reflection", "end_with_stdin"])
def test_what_a_serve_config_says_itself_is_refused_in_its_arguments(name: str) -> None:
    assert f"args: {name} is without effect here" in (unheeded({"model": "x", name: 1}) or "")
    assert unheeded({"model": "x", "threads": 8}) is None


def test_replicas_share_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    given: Any = {"ray": True, "ray_replicas": 1, "ray_max_replicas": 3}
    assert with_threads(Settings(**given)).threads == 2
    assert with_threads(Settings(threads=5, **given)).threads == 5
    assert with_memory(Settings(**given), 0).kv_memory_share == pytest.approx(0.1)
    more: Any = {**given, "ray_model": {"a": "b"}, "ray_loaded_models": 2}
    assert with_memory(Settings(**more), 0).kv_memory_share == pytest.approx(0.3 / 9)
    for own in ({"kv_memory": 1 << 30}, {"kv_memory_share": 0.2}):
        assert with_memory(Settings(**own, **given), 0) == Settings(**own, **given)
    assert with_memory(Settings(**given), 3) == Settings(**given)
    for device, gpus in (("cuda", 0), ("auto", 2)):
        with pytest.raises(RefusedError, match=f"Ray finds {gpus} here for up to 3 replicas"):
            with_memory(Settings(device=device, **given), gpus)
    assert with_memory(Settings(device="cpu", **given), 2).kv_memory_share == pytest.approx(0.1)


def test_what_goes_together_is_not() -> None:
    given: Any = {"identities": Path("i.toml"), "ray_model": {"a": "b"}, "ray_loaded_models": 2}
    assert refusal(Settings(ray=True, host="0.0.0.0", insecure=True, ray_max_replicas=4, **given)) is None


def test_clients_are_told_of_models_without_their_folders() -> None:
    told = shown(Settings(ray=True, ray_model={"a": "/secret/b"}, draft_model="/secret/c"))
    assert (told["ray_model"], told["draft_model"]) == ("{'a': 'b'}", "c")


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(typer.Exit) as end:
        _with_ray(Settings(ray=True))
    assert end.value.exit_code == 2
    assert "install longspan[ray]" in capsys.readouterr().err
