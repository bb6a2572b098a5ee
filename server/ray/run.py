"""``longspan serve --ray``: a Ray of its own on this machine until it is told to end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.exceptions import RayServeException

from longspan import Client, LongspanError
from server.api.listen import refuse_taken
from server.errors import RefusedError
from server.observe.logging import configure_logging
from server.ray import edge, loopback
from server.ray.deploy import END_SECONDS, application
from server.ray.machine import most_replicas, with_memory, with_threads
from server.settings import Settings

log = logging.getLogger("longspan.ray")

_APPLICATION = "longspan"
_INTERRUPTED = 128 + signal.SIGINT


class _ToldToEnd(BaseException):
    """A signal came."""

    def __init__(self, number: int) -> None:
        self.number = number


def serve_with_ray(settings: Settings) -> int:
    """Serves until a signal comes.

    Args:
        settings: of the replicas, and of Ray.

    Returns:
        The process's exit code: 0 when it was told to end, 130 if by Ctrl-C before it was ready, 1 if it
        can't serve.
    """
    configure_logging(settings.log_level, settings.log_format)
    ready = False
    try:
        _take_signals()
        try:
            port = settings.port or _free_port(settings.host)
            settings = with_threads(settings.model_copy(update={"port": port}))
            refuse_taken(settings.host, settings.port)
            _begin(settings)
            ready = True
            _wait(settings)
        finally:
            _end(settings.drain_seconds if ready else 0)
    except _ToldToEnd as told:
        return _INTERRUPTED if told.number == signal.SIGINT and not ready else 0
    except SystemExit as told:  # while Ray starts, the handler of SIGTERM is its own
        if told.code != signal.SIGTERM:
            raise
    except (RefusedError, RayServeException, LongspanError, RuntimeError, OSError) as error:
        print(f"longspan: {error}", file=sys.stderr)
        return 1
    return 0


def _begin(settings: Settings) -> None:
    assert settings.threads is not None
    variables = loopback.environment(settings.host, settings.port)
    log.info("starting Ray")
    ray.init(
        address="local",
        num_cpus=most_replicas(settings) * settings.threads,  # so that Ray has room for all replicas
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=True,
        _node_ip_address="127.0.0.1",
        runtime_env={"worker_process_setup_hook": loopback.HOOK, "env_vars": variables},
    )
    _take_signals()  # Ray has put handlers of its own in their place
    settings = with_memory(settings, int(ray.cluster_resources().get("GPU", 0)))
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host="127.0.0.1", port=0),
        grpc_options=gRPCOptions(
            port=settings.port,
            grpc_servicer_functions=[edge.FUNCTION],
            enable_reflection=settings.reflection,
        ),
    )
    log.info("starting %d replicas of %d threads", settings.ray_replicas, settings.threads)
    try:
        serve.run(application(settings), name=_APPLICATION)
    except RuntimeError as error:
        raise RefusedError(_why()) from error
    if not settings.insecure and (found := loopback.exposed(settings.host)):
        raise RefusedError(
            f"Ray listens on {', '.join(found)}, which other machines reach; use a version of Ray that "
            "this was tried with (constraints.txt), or say --insecure where the network protects it"
        )
    print(_ready_lines(settings), flush=True)


def _why() -> str:
    """Why replicas did not start: the sentence of a refusal, where Ray tells one, else all that it tells."""
    told = "\n".join(each.message for each in serve.status().applications[_APPLICATION].deployments.values())
    refusal = re.search(r"RefusedError: (.+)", told)
    return refusal[1] if refusal else f"replicas did not start: {told}"


def _ready_lines(settings: Settings) -> str:
    with Client(settings.host, settings.port, timeout=30) as client:
        client.wait_until_ready(30)
        try:
            name = client.model_info().name
        except LongspanError:  # it asks for a token
            name = settings.model_name or settings.model or "the default model"
    lines = f"Longspan is ready: {name} on {settings.host}:{settings.port}\n"
    most = most_replicas(settings)
    count = str(most) if most == settings.ray_replicas else f"{settings.ray_replicas} to {most}"
    lines += f"  replicas by Ray Serve: {count}, threads of each: {settings.threads}"
    if settings.metrics and settings.metrics_port:
        lines += (
            f", metrics http://{settings.metrics_host}:{settings.metrics_port}/metrics and the ports after it"
        )
    elif settings.metrics:
        lines += ", metrics on ports that the log tells"
    return lines


def _wait(settings: Settings) -> NoReturn:
    if settings.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    while True:
        signal.pause()


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    log.warning("standard input has ended, and so does this server (--end-with-stdin)")
    os.kill(os.getpid(), signal.SIGTERM)


def _end(drain_seconds: float) -> None:
    """Drains the replicas, and ends Ray; another signal ends it at once."""
    try:
        if ray.is_initialized():
            if drain_seconds:
                _drain(drain_seconds + END_SECONDS)
            serve.shutdown()
    except _ToldToEnd:
        log.warning("ending at once")
    finally:
        ray.shutdown()


def _drain(seconds: float) -> None:
    """Lets running requests finish: to be shut down Serve ends its proxy at once, and all streams with it."""
    log.info("waiting up to %.0f s for requests; Ctrl-C again ends them", seconds)
    serve.delete(_APPLICATION, _blocking=False)
    end = time.monotonic() + seconds
    while _APPLICATION in serve.status().applications and time.monotonic() < end:
        time.sleep(0.1)


def _take_signals() -> None:
    """From now on signals that end a server raise ``_ToldToEnd`` in the main thread."""

    def tell(number: int, frame: object) -> NoReturn:
        raise _ToldToEnd(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, tell)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
