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
from server.ray.refusing import _REFUSED, refusal
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
        ({"ray": True, "host": "0.0.0.0"}, "speaks no TLS; listen on 127.0.0.1, or say --insecure"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], sentence: str) -> None:
    assert sentence in (refusal(Settings(**given)) or "")


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
