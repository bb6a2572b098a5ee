"""Settings of serving by Ray Serve: how many replicas, when there are more of them, further models."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings

from server.setting_types import Options


class RaySettings(BaseSettings):
    """Those after the network's. Without ``ray`` none of them has a meaning."""

    ray: bool = Field(
        False,
        description="Serve by Ray Serve on this machine: replicas of the server behind Ray's gRPC proxy. "
        "Needs longspan[ray].",
    )
    ray_replicas: int = Field(1, ge=1, le=1024, description="With --ray: replicas, at least.")
    ray_max_replicas: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Replicas, at most; between these bounds Ray starts and ends them by the requests in "
        "flight. Without it: --ray-replicas.",
    )
    ray_target_requests: float = Field(
        8.0,
        gt=0,
        allow_inf_nan=False,
        description="Requests in flight, running or waiting, that a replica should have in the mean; with "
        "more there are more replicas.",
    )
    ray_scale_up_seconds: float = Field(
        30.0, ge=0, le=86400, description="How long there must be more requests before a replica is added."
    )
    ray_scale_down_seconds: float = Field(
        600.0, ge=0, le=86400, description="How long there must be fewer before one is taken away."
    )
    ray_model: Options = Field(
        default_factory=dict,
        description="A further model as NAME=MODEL, which a replica loads when a call names it in the "
        "metadata multiplexed_model_id; may be repeated.",
    )
    ray_loaded_models: int = Field(
        1,
        ge=1,
        le=1024,
        description="Further models that a replica has loaded, at most; for another one, that least recently "
        "asked for ends.",
    )
