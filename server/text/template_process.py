"""Chat templates, which are programs, rendered where they can be ended: see ``template_program.py``."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from server.text.template_program import HEADER, content, frame

# Rendering takes milliseconds; the process imports transformers first, which takes seconds on a busy machine.
_SECONDS, _START_SECONDS = 5.0, 60.0
_CLOSE_SECONDS = 1.0  # renderings may be waiting for their turn
_MEMORY = 512 << 20
# A template may write this much of its own, and all that it is given some times over.
_OWN_CHARACTERS, _TIMES = 1 << 20, 4
_READ_BYTES = 1 << 20


class TemplateEndedError(Exception):
    """A template was ended: it took too long, or more memory than it may."""


class NotStartedError(Exception):
    """The process that renders could not be started: the machine's fault, not the template's."""


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

    def start(self) -> None:
        """Starts the process, which gets ready by itself; nothing where it runs."""
        with self._lock, contextlib.suppress(OSError):  # the first rendering says so
            self._started()

    def close(self) -> None:
        """Ends the process, and with it what it renders."""
        process = self._process
        if process is not None:
            process.kill()  # a rendering, which holds the lock, ends by that
        if self._lock.acquire(timeout=_CLOSE_SECONDS):
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
            NotStartedError: there is no process to render it.
        """
        question = {"template": template, "messages": messages, "tokens": tokens, "seconds": self._seconds}
        given = sum(len(message["role"]) + len(str(message["content"])) for message in messages)
        question["most"] = _OWN_CHARACTERS + _TIMES * given
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(frame(question))
                process.stdin.flush()
                # A little longer than the process gives itself.
                answer = self._read(process, self._seconds + 1)
            except (TemplateEndedError, OSError) as error:
                self._end()
                took_long = f"it takes longer than {self._seconds:g} s, or too much memory"
                raise TemplateEndedError(took_long) from error
        if "line" in answer:
            raise jinja2.TemplateSyntaxError(answer["error"], answer["line"])
        if "error" in answer:
            raise jinja2.TemplateError(answer["error"])
        text: str = answer["text"]
        return text

    def _running(self) -> subprocess.Popen[bytes]:
        try:
            process = self._started()
            if not self._ready:
                self._read(process, _START_SECONDS)
                self._ready = True
        except (TemplateEndedError, OSError) as error:
            self._end()
            raise NotStartedError(f"{type(error).__name__} {error}".strip()) from error
        return process

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._ready = False
            self._process = subprocess.Popen(
                # Not the working directory first: a user may have a server.py there.
                [sys.executable, "-P", "-m", "server.text.template_program"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C in a terminal is for the server, which drains
            )
            assert self._process.stdin is not None
            self._process.stdin.write(frame({"memory": _MEMORY}))
            self._process.stdin.flush()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    @staticmethod
    def _read(process: subprocess.Popen[bytes], seconds: float) -> Any:
        """One frame, if it comes in time.

        Raises:
            TemplateEndedError: it doesn't.
        """
        assert process.stdout is not None
        end = time.monotonic() + seconds
        got, size = bytearray(), HEADER.size
        ready = select.poll()
        ready.register(process.stdout, select.POLLIN)
        while len(got) < size:
            if not ready.poll(max(end - time.monotonic(), 0) * 1000):
                raise TemplateEndedError
            more = os.read(process.stdout.fileno(), min(size - len(got), _READ_BYTES))
            if not more:
                raise TemplateEndedError
            got += more
            if size == HEADER.size == len(got):
                size += HEADER.unpack(got)[0]
        return content(bytes(got[HEADER.size :]))


@functools.cache
def template_process() -> TemplateProcess:
    """The one of this process; it renders the templates of all models."""
    process = TemplateProcess()
    atexit.register(process.close)
    return process
