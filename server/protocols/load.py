"""The services of the protocols that ``--protocols`` names; their packages are imported only for these."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from google.protobuf.runtime_version import VersionError

from server.api.other_service import OtherService
from server.api.service import InferenceServicer
from server.errors import RefusedError

_SERVICES = {
    "vllm": "vllm.grpc.engine.VllmEngine",
    "kserve": "inference.GRPCInferenceService",
    "channelz": "grpc.channelz.v1.Channelz",
}


def service_names(protocols: str) -> tuple[str, ...]:
    """Full names of the services.

    Args:
        protocols: the setting.
    """
    return tuple(_SERVICES[name] for name in _names(protocols))


def services(protocols: str, service: InferenceServicer) -> list[OtherService]:
    """The services.

    Args:
        protocols: the setting.
        service: answers their requests.

    Raises:
        RefusedError: a package with a protocol's messages is not installed, or too new for protobuf.
    """
    return [_load(name)(service) for name in _names(protocols)]


def _names(protocols: str) -> list[str]:
    return [name for name in protocols.split(",") if name]


def _load(name: str) -> Callable[[InferenceServicer], OtherService]:
    try:
        made: Callable[[InferenceServicer], OtherService] = importlib.import_module(
            f"server.protocols.{name}"
        ).service
    except (ImportError, VersionError) as error:
        raise RefusedError(
            f"--protocols {name}: the messages of that protocol can't be imported ({error}); install "
            "longspan[protocols], or leave it out"
        ) from error
    return made
