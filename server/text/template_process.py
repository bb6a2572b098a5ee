"""Chat templates, which are programs, rendered where they can be ended: see ``template_program.py``."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jinja2

from server.text.template_program import HEADER, content, frame

log = logging.getLogger("longspan.text")

# Rendering takes milliseconds; the process imports a part of transformers first: seconds on a busy machine.
_SECONDS, _START_SECONDS = 5.0, 60.0
# The process ends itself where a rendering takes too long. One that does not is stopped, or has no core.
_SILENT_SECONDS = 3.0
_LAST_SECONDS = 1.0  # of a process that has closed its pipe
_CLOSE_SECONDS, _KILL_AGAIN_SECONDS = 1.0, 0.05  # another may have been started just then
_MEMORY = 512 << 20
# A template may write this much of its own, and all that it is given some times over.
_OWN_CHARACTERS, _TIMES = 1 << 20, 4
_PIPE_BYTES = 1 << 20
_CLOSED = "the process that renders chat templates has been closed"


class TemplateEndedError(Exception):
    """A template was ended: it took too long, or more memory than it may."""


class NotRenderedError(Exception):
    """The process that renders did not start, did not answer or was killed: not the template's fault.

    The message is a sentence without an end.
    """


class TemplateProcess:
    """Renders templates, one rendering at a time, in a process that is started again where it was ended.

    Methods may be called from several threads, which wait for each other.

    Args:
        seconds: how long one rendering may take.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._closes = 0

    def start(self) -> None:
        """Starts the process, which gets ready by itself; nothing where it runs."""
        with self._lock, contextlib.suppress(OSError):  # the first rendering says so
            self._started(self._closes)

    def close(self) -> None:
        """Ends the process, and with it what it renders and what waits for its turn."""
        self._closes += 1  # first: those that wait would start another process
        end = time.monotonic() + _CLOSE_SECONDS
        held = False
        while not held and time.monotonic() < end:
            process = self._process
            if process is not None:
                process.kill()  # a rendering, which holds the lock, ends by that
            held = self._lock.acquire(timeout=_KILL_AGAIN_SECONDS)
        if held:
            try:
                self._end()
            finally:
                self._lock.release()

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
        """The prompt for a conversation, up to the model's next turn, as transformers renders it.

        Args:
            template: in Jinja.
            messages: the turns, as the template gets them.
            tokens: special tokens by their names in templates.

        Raises:
            jinja2.TemplateSyntaxError: it is no template.
            jinja2.TemplateError: what the template raised.
            TemplateEndedError: it took too long, or the process ended over it.
            NotRenderedError: there is no process to render it, or it was lost meanwhile.
        """
        question = {"template": template, "messages": messages, "tokens": tokens, "seconds": self._seconds}
        given = sum(len(message["role"]) + len(str(message["content"])) for message in messages)
        question["most"] = _OWN_CHARACTERS + _TIMES * given
        closes = self._closes
        with self._lock:
            process = self._running(closes)
            seconds = self._seconds + _SILENT_SECONDS
            end = time.monotonic() + seconds
            try:
                _write(process, frame(question), end)
                answer = _read(process, end)
            except TimeoutError as error:
                self._start_again(closes)
                raise _lost(f"did not answer within {seconds:g} s") from error
            except (EOFError, OSError) as error:
                code = self._exit_code()
                if self._closes != closes:
                    raise NotRenderedError(_CLOSED) from error
                self._start_again(closes)
                if code == -signal.SIGKILL:
                    raise _lost("was killed") from error
                took_long = f"it takes longer than {self._seconds:g} s, or too much memory"
                raise TemplateEndedError(took_long) from error
        if "line" in answer:
            raise jinja2.TemplateSyntaxError(answer["error"], answer["line"])
        if "error" in answer:
            raise jinja2.TemplateError(answer["error"])
        text: str = answer["text"]
        return text

    def _running(self, closes: int) -> subprocess.Popen[bytes]:
        try:
            process = self._started(closes)
            if not self._ready:
                _read(process, time.monotonic() + _START_SECONDS)
                self._ready = True
        except (EOFError, OSError) as error:
            self._end()
            if self._closes != closes:
                raise NotRenderedError(_CLOSED) from error
            raise _lost(f"does not start: {type(error).__name__} {error}".strip()) from error
        return process

    def _started(self, closes: int) -> subprocess.Popen[bytes]:
        if self._closes != closes:
            raise OSError(_CLOSED)
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._ready = False
            self._process = subprocess.Popen(
                # Not the working directory first: a user may have a server.py there.
                [sys.executable, "-P", "-m", "server.text.template_program"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                process_group=0,  # Ctrl-C in a terminal is for the server, which drains
            )
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            self._process.stdin.write(frame({"memory": _MEMORY}))
        return self._process

    def _exit_code(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_LAST_SECONDS)
        return None

    def _start_again(self, closes: int) -> None:
        self._end()
        with contextlib.suppress(OSError):  # the next rendering says so
            self._started(closes)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _lost(how: str) -> NotRenderedError:
    sentence = f"the process that renders chat templates {how}"
    log.error("%s", sentence)
    return NotRenderedError(sentence)


def _write(process: subprocess.Popen[bytes], data: bytes, end: float) -> None:
    """Writes, if it can until then.

    Raises:
        TimeoutError: it can't.
        OSError: the process has ended.
    """
    assert process.stdin is not None
    left = memoryview(data)
    while left:
        _wait(process.stdin, select.POLLOUT, end)
        left = left[os.write(process.stdin.fileno(), left[:_PIPE_BYTES]) :]


def _read(process: subprocess.Popen[bytes], end: float) -> Any:
    """One frame, if it comes until then.

    Raises:
        TimeoutError: it doesn't.
        EOFError: the process has ended.
    """
    assert process.stdout is not None
    got, size = bytearray(), HEADER.size
    while len(got) < size:
        _wait(process.stdout, select.POLLIN, end)
        more = os.read(process.stdout.fileno(), min(size - len(got), _PIPE_BYTES))
        if not more:
            raise EOFError
        got += more
        if size == HEADER.size == len(got):
            size += HEADER.unpack(got)[0]
    return content(bytes(got[HEADER.size :]))


def _wait(stream: IO[bytes], event: int, end: float) -> None:
    ready = select.poll()
    ready.register(stream, event)
    if not ready.poll(max(end - time.monotonic(), 0) * 1000):
        raise TimeoutError


@functools.cache
def template_process() -> TemplateProcess:
    """The one of this process; it renders the templates of all models."""
    process = TemplateProcess()
    atexit.register(process.close)
    return process
