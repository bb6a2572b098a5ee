"""The application that Ray Serve deploys: a deployment of replicas, and what Ray is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from server.errors import RefusedError
from server.ray.machine import gpus_of_each, most_replicas
from server.ray.refusing import refusal, unheeded
from server.ray.replica import Replica, multiplexed
from server.settings import Settings

DEPLOYMENT = "Longspan"

# As many sequences as run at once by default on a device that runs most, and calls that ask for no sequence.
_MOST_RUNNING, _BESIDE = 256, 64
END_SECONDS = 5.0
"""For the engine and the rest to end, once no call is under way."""


def application(settings: Settings) -> serve.Application:
    """The application.

    Args:
        settings: of each replica.

    Raises:
        RefusedError: they have no meaning with Ray Serve.
    """
    if sentence := refusal(settings):
        raise RefusedError(sentence)
    kind = multiplexed(settings.ray_loaded_models) if settings.ray_model else Replica
    return serve.deployment(kind, name=DEPLOYMENT).options(**_options(settings)).bind(settings)


def app(args: Mapping[str, Any]) -> serve.Application:
    """Builds the application for a Serve config, or for ``serve run``.

    Args:
        args: settings by their names with underscores; what they leave open is as the environment says.

    Raises:
        RefusedError: the settings have no meaning with Ray Serve, or are up to the config.
        pydantic.ValidationError: there is no such setting, or its value is wrong.
    """
    if sentence := unheeded(args):
        raise RefusedError(sentence)
    return application(Settings(**{**args, "ray": True}))


def _options(settings: Settings) -> dict[str, Any]:
    most = most_replicas(settings)
    if most == settings.ray_replicas:
        count: dict[str, Any] = {"num_replicas": most}
    else:
        scaling = AutoscalingConfig(
            min_replicas=settings.ray_replicas,
            max_replicas=most,
            target_ongoing_requests=settings.ray_target_requests,
            upscale_delay_s=settings.ray_scale_up_seconds,
            downscale_delay_s=settings.ray_scale_down_seconds,
        )
        count = {"autoscaling_config": scaling}
    return {
        **count,
        # Beyond these, calls wait in the proxy. A replica itself refuses what it has no place for.
        "max_ongoing_requests": (settings.max_running or _MOST_RUNNING) + settings.max_queue + _BESIDE,
        "ray_actor_options": {"num_cpus": settings.threads or 1, "num_gpus": _gpus(settings)},
        "graceful_shutdown_timeout_s": settings.drain_seconds + END_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 3,
        "logging_config": {"enable_access_log": False},  # Longspan's own log has a line for each request
    }


def _gpus(settings: Settings) -> int:
    there = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    return gpus_of_each(settings, int(there))
