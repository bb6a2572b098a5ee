"""Deployments that are served within the tests' own process: for what a server answers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from loadtest.deployment import Deployment
from tests.e2e.here import serving
from tests.e2e.server import Running


def within(deployment: Deployment, **settings: Any) -> AbstractContextManager[Running]:
    """A server of it while the block runs, with further settings as ``server.settings.Settings`` has them."""
    return serving(attention=deployment.attention, attention_option=dict(deployment.options), **settings)
