"""Deployments that are served within the tests' own process: for what a server answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from loadtest.deployment import Deployment
from tests.e2e.here import serving
from tests.e2e.server import Running


def within(deployment: Deployment, **settings: Any) -> AbstractContextManager[Running]:
    """A server of it while the block runs, with further settings as ``server.settings.Settings`` has them."""
    return serving(attention=deployment.attention, attention_option=dict(deployment.options), **settings)


def as_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Options of ``longspan serve`` that all have a value, as settings."""
    names = [name.removeprefix("--").replace("-", "_") for name in arguments[::2]]
    return dict(zip(names, arguments[1::2], strict=True))
