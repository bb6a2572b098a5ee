"""What each replica takes of a machine that all of them share: cores, memory, GPUs."""

from __future__ import annotations

from server.engine.cores import usable_cores
from server.errors import RefusedError
from server.settings import Settings
from server.sizes import Sizes


def most_replicas(settings: Settings) -> int:
    """Replicas that there are at most."""
    return settings.ray_max_replicas or settings.ray_replicas


def gpus_of_each(settings: Settings, gpus: int) -> int:
    """GPUs that a replica asks Ray for, which hides all from a process that asks for none.

    Args:
        settings: of each replica.
        gpus: of the cluster.
    """
    return int(settings.device == "cuda" or (settings.device == "auto" and gpus > 0))


def with_threads(settings: Settings) -> Settings:
    """Settings of replicas that share this machine's cores, where theirs leave open how many each takes."""
    threads = settings.threads or max(1, usable_cores() // most_replicas(settings))
    return settings.model_copy(update={"threads": threads})


def with_memory(settings: Settings, gpus: int) -> Settings:
    """The same of its memory: all may read how much is free before any has taken its share.

    Args:
        settings: of each replica.
        gpus: of this machine.

    Raises:
        RefusedError: there are fewer GPUs than replicas, and Ray would wait for them.
    """
    most = most_replicas(settings)
    if gpus_of_each(settings, gpus):
        if most > gpus:
            raise RefusedError(
                f"each replica takes a GPU, and Ray finds {gpus} here for up to {most} replicas; lower "
                "--ray-replicas or --ray-max-replicas, or say --device cpu"
            )
        return settings
    if settings.kv_memory is not None or settings.kv_memory_share is not None:
        return settings
    engines = most * (1 + (settings.ray_loaded_models if settings.ray_model else 0))
    return settings.model_copy(
        update={"kv_memory_share": Sizes.of(settings, "cpu").kv_memory_share / engines}
    )
