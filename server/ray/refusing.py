"""Refusals of settings that have no meaning with Ray Serve, or none without it."""

from __future__ import annotations

from collections.abc import Iterable

from server.access.granted import only_this_machine
from server.ray.loopback import MESSAGE_BYTES
from server.ray_settings import RaySettings
from server.settings import Settings

_OF_PORT = "Ray's proxy has the port, and no such limit; leave it out"
_TLS = "Ray's proxy speaks no TLS; put Envoy before it, or leave it out"
_ONE_SERVER = "each replica would have the same address; leave it out"
_NOT_CARRIED = "only Longspan's own services go through Ray's proxy; leave it out"
_REFUSED = {
    "tls_certificate": _TLS,
    "tls_key": _TLS,
    "tls_client_ca": _TLS,
    "max_connections": _OF_PORT,
    "max_streams_per_connection": _OF_PORT,
    "connection_idle_seconds": _OF_PORT,
    "connection_age_seconds": _OF_PORT,
    "connection_grace_seconds": _OF_PORT,
    "kv_events": _ONE_SERVER,
    "kv_events_replay": _ONE_SERVER,
    "protocols": _NOT_CARRIED,
    "load_reports": _NOT_CARRIED,
}
# Which a Serve config says in its own words, or has no use for.
_OF_COMMAND = {
    "host": "Ray's proxies listen on all addresses",
    "port": "it is grpc_options.port of the config",
    "reflection": "it is grpc_options.enable_reflection of the config",
    "end_with_stdin": "replicas end when Ray ends them",
}
_SCALING = ("ray_target_requests", "ray_scale_up_seconds", "ray_scale_down_seconds")


def unheeded(names: Iterable[str]) -> str | None:
    """Why one of these settings does not belong into a Serve config, in a sentence; ``None`` if all do."""
    for name in names:
        if name in _OF_COMMAND:
            return f"args: {name} is without effect here: {_OF_COMMAND[name]}; leave it out"
    return None


def refusal(settings: Settings) -> str | None:
    """Why settings of Ray Serve, or others with these, are refused, in a sentence; ``None`` if they are not.

    Raises:
        RefusedError: ``host`` stands for no address.
    """
    if not settings.ray:
        return _stray(settings)
    for name, reason in _REFUSED.items():
        if _given(settings, name):
            return f"{_flag(name)} does not go with --ray: {reason}"
    highest = settings.ray_max_replicas
    if highest is not None and highest < settings.ray_replicas:
        return f"--ray-max-replicas {highest} is less than --ray-replicas {settings.ray_replicas}; raise it"
    for name in _SCALING:
        if (highest or settings.ray_replicas) == settings.ray_replicas and _given(settings, name):
            return (
                f"{_flag(name)}: the number of replicas is fixed; raise --ray-max-replicas, or leave it out"
            )
    if (settings.max_request_bytes or 0) > MESSAGE_BYTES:
        most = MESSAGE_BYTES >> 20
        return f"--max-request-bytes: no message of more than {most} MiB goes through Ray; lower it"
    if not settings.ray_model and _given(settings, "ray_loaded_models"):
        return "--ray-loaded-models: no further model is named; name some by --ray-model, or leave it out"
    if not settings.insecure and not only_this_machine(settings.host):
        return (
            f"--host {settings.host}: other machines could use Ray's proxy, which speaks no TLS; listen on "
            "127.0.0.1, or say --insecure where the network protects it"
        )
    return None


def _stray(settings: Settings) -> str | None:
    for name in RaySettings.model_fields:
        if name != "ray" and _given(settings, name):
            return f"{_flag(name)} has no meaning without --ray; set that too, or leave this out"
    return None


def _given(settings: Settings, name: str) -> bool:
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(settings, name) != default)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
