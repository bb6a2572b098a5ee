"""The engine's process: loads the model, then turns messages into steps and steps into messages.

Started by ``spawn`` with the descriptors of its end of the link, on which ``Launch`` comes first, and of the
memory of its pulse, and with the server process's id. The end of the link, which is that of the server
process, tells the engine to end too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from server.encoder_messages import Encode
from server.engine.compiling import tell_of_compiling
from server.engine.ipc.pulse import Pulse
from server.engine.ipc.spawn import STACKS_SIGNAL
from server.engine.ipc.wire import EngineEnd
from server.errors import RefusedError
from server.messages import (
    Abort,
    Failed,
    FinishReason,
    FromEngine,
    Launch,
    Loading,
    SequenceOutput,
    Shutdown,
    StepOutput,
    Submit,
    ToEngine,
)
from server.observe.logging import configure_logging
from server.parent import end_with_parent
from server.settings import Settings

log = logging.getLogger("longspan.engine")


class Engine:
    """The message loop around an ``EngineCore`` or an ``EncoderCore``.

    Args:
        wire: the link to the server process.
        pulse: tells that process what is done here.
    """

    def __init__(self, wire: EngineEnd, pulse: Pulse) -> None:
        self._wire = wire
        self._pulse = pulse
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromEngine) -> None:
        """Sends a message to the server process."""
        self._wire.send(self._encoder.encode(message))

    def run(self, core: Any) -> None:
        """Serves until it is told to end or the server process has ended."""
        while True:
            wait: int | None = 0
            if not core.has_work:
                self._pulse.rest()
                wait = None
            while self._wire.poll(wait):
                payload = self._wire.receive()
                if payload is None:
                    log.info("the server process has ended, and so does the engine")
                    return
                message = self._decoder.decode(payload)
                if isinstance(message, Shutdown):
                    return
                self._pulse.begin()
                self._handle(core, message)
                self._pulse.handle()
                wait = 0
            if core.has_work:
                self._pulse.begin()
                self.send(core.step())

    def _handle(self, core: Any, message: Submit | Encode | Abort) -> None:
        if isinstance(message, Abort):
            for sequence_id in message.ids:
                core.abort(sequence_id)
            if not core.has_work:  # no step output will say that the pages are free
                self.send(StepOutput(time.monotonic(), [], core.stats()))
            return
        try:
            core.submit(message)
        except ValueError:
            # The server process validates; an invalid request must not fail the other sequences.
            log.exception("sequence %d was refused", message.id)
            refusals = [SequenceOutput(id_, [], finish=FinishReason.FAILED) for id_ in message.ids]
            self.send(StepOutput(time.monotonic(), refusals, core.stats()))


def main() -> int:
    """Runs the engine process; its exit code is 0 only if it was told to end."""
    # Ctrl-C and a terminal's end reach the whole process group; the server process decides when the engine
    # may end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Blocked since before there was a handler; ignored from here on, also by programs that the engine runs.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    link, memory, server = map(int, sys.argv[1:])
    end_with_parent(server)  # a step that hangs never sees the end of the link
    faulthandler.register(STACKS_SIGNAL)
    pulse = Pulse(memory)
    os.close(memory)
    os.set_inheritable(link, False)  # programs that the engine runs must not keep the link open
    wire = EngineEnd(socket.socket(fileno=link))
    # Before the settings arrive: it takes a second. A failure here recurs where it can be reported.
    with contextlib.suppress(Exception):
        importlib.import_module("server.engine.start")
    return serve(wire, pulse)


def serve(wire: EngineEnd, pulse: Pulse) -> int:
    """An engine's life on its end of the link, from ``Launch`` on.

    Args:
        wire: the link to the server process.
        pulse: tells that process what is done here.

    Returns:
        The exit code of its process: 0 only if it was told to end.
    """
    wire.poll(None)
    first = wire.receive()
    if first is None:
        return 1
    launch = msgspec.msgpack.decode(first, type=Launch)
    settings = Settings.model_validate(json.loads(launch.settings))
    configure_logging(settings.log_level, settings.log_format)
    engine = Engine(wire, pulse)
    engine.send(Loading("starting the engine", 0.0))  # the server process waits for an answer
    try:
        from server.engine.start import start_engine

        core, ready = start_engine(
            settings,
            Path(launch.folder),
            lambda stage, fraction: engine.send(Loading(stage, fraction)),
            wire.descriptor,
            None if launch.tokenizer is None else Path(launch.tokenizer),
        )
        tell_of_compiling(pulse.compile)
        gc.collect()
        gc.freeze()
        engine.send(ready)
        engine.run(core)
    except RefusedError as refusal:
        engine.send(Failed(str(refusal)))
        return 1
    except Exception as error:
        log.exception("the engine failed")
        engine.send(Failed(f"the engine failed: {type(error).__name__}: {error}"))
        return 1
    finally:
        wire.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
