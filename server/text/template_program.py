"""Renders chat templates in a process of its own; ``template_process.py`` starts it and talks to it.

A frame is its length in four bytes and JSON: asked for is a template, messages and special tokens, answered a
text or what went wrong. The process ends itself where a rendering takes too long, also if who asked has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
from pathlib import Path
from typing import Any, BinaryIO

from server.text.light import alone

HEADER = struct.Struct("<I")
# A template may raise what it was given.
_MOST_SAID = 1000


def read_frame(stream: BinaryIO) -> Any:
    """One frame's content; ``None`` at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return content(stream.read(*HEADER.unpack(header)))


def content(body: bytes) -> Any:
    """The content of a frame, after its header."""
    return json.loads(body)


def frame(said: Any) -> bytes:
    """A frame that says this."""
    # Escaped, since lone surrogates, which mark what is to stay text, have no other form.
    body = json.dumps(said).encode("ascii")
    return HEADER.pack(len(body)) + body


def _render(render: Any, template: str, messages: Any, tokens: dict[str, str], most: int) -> dict[str, Any]:
    import jinja2

    try:
        (text,), _ = render(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **tokens
        )
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message or "", "line": error.lineno}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template is a program, and raises whatever it likes
        return {"error": str(error)[:_MOST_SAID] or type(error).__name__}
    if len(text) > most:
        return {"error": f"it writes {len(text)} characters; of this conversation it may make {most}"}
    return {"text": text}


def _limit_memory(more: int) -> None:
    """Holds the process to its present address space and ``more`` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Answers until standard input ends."""
    # Lines that a library prints must not come between the frames.
    answers, questions = os.fdopen(os.dup(1), "wb", buffering=0), os.fdopen(0, "rb")
    os.dup2(2, 1)
    # Before the first question: no request should wait for it.
    render = alone("transformers.utils.chat_template_utils").render_jinja_template

    first = read_frame(questions)
    if first is None:
        return
    _limit_memory(first["memory"])
    answers.write(frame("ready"))
    while (asked := read_frame(questions)) is not None:
        signal.setitimer(signal.ITIMER_REAL, asked.pop("seconds"))
        answer = frame(_render(render, **asked))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(answer)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # who asked has ended
        main()
