"""``longspan read``: a question about a document longer than the model's context, or its summary."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.connection import Connection, connected
from server.cli.progress import progress
from server.cli.shared import fail, fail_call
from server.cli.signals import INTERRUPTED, interrupts_raise
from server.cli.terminal import shown

if TYPE_CHECKING:
    from longspan.reading import Citation, Reading, ReadOptions

_EXCERPT = 160  # characters of a line that is shown
# Of a document: hundreds of thousands of requests, and in memory several times its size.
_MOST_BYTES = 256 << 20


@connected
def read(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The document, UTF-8 text; - reads it from standard input.")
    ],
    question: Annotated[
        str | None, typer.Option(help="What to answer from the document. Without it: its summary.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="map-reduce|hierarchical|extractive",
            help="Ask every passage and merge the answers; the same, section by section; or answer from the "
            "passages that fit the question best.",
        ),
    ] = "map-reduce",
    model: Annotated[str, typer.Option(help="Name of the model. Without it: the server's only one.")] = "",
    passage_tokens: Annotated[
        int, typer.Option(min=32, help="Most tokens of a passage; fewer where the context has no room.")
    ] = 512,
    overlap: Annotated[
        int,
        typer.Option(
            min=0,
            help="Most tokens of a passage that the next one repeats, in whole sentences; half at most.",
        ),
    ] = 64,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Most passages that an extractive answer is written from. Without it: 4."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    citations: Annotated[int, typer.Option(min=0, help="Most passages to cite; 0 saves the time.")] = 3,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with answer, cited passages and cost.")
    ] = False,
    stats: Annotated[
        bool | None,
        typer.Option(
            help="What it cost, on standard error.", show_default="where standard error is a terminal"
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds for the whole reading.")] = None,
    *,
    connection: Connection,
) -> None:
    """Read a document longer than the model's context.

    By many short requests, whatever attention the server has. Ends with 1 if no passage tells an answer.
    Ctrl-C ends the requests on the server too.
    """
    from longspan.reading import ReadOptions

    if top is not None and method != "extractive":
        fail("--top needs --method extractive: the other methods read all passages", code=2)
    if question is not None and not question.strip():
        fail("--question is empty; leave it out for a summary", code=2)
    question = question or ""
    content = _content(file)
    began = time.monotonic()
    with progress() as listener:
        try:
            options = ReadOptions(
                method=method,  # type: ignore[arg-type]  # it checks the name
                model=model,
                passage_tokens=passage_tokens,
                overlap=overlap,
                **({} if top is None else {"top": top}),
                max_tokens=max_tokens,
                citations=citations,
                concurrency=concurrency,
                listener=listener,
            )
        except ValueError as error:
            fail(f"{error}", code=2)
        reading = _run(connection, content, question, options, timeout, file)
    seconds = time.monotonic() - began
    if as_json:
        document = json.dumps(_document(reading, file, question, seconds), ensure_ascii=False)
        print(shown(document, sys.stdout))
    elif reading.text:
        _show(reading, file, citations)
    if sys.stderr.isatty() if stats is None else stats:
        typer.echo(_stats(reading, seconds), err=True)
    if not reading.text:
        fail("no passage tells an answer to the question")


def _content(file: str) -> bytes:
    try:
        with sys.stdin.buffer if file == "-" else Path(file).open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)  # of a device or a pipe there may be no end
    except OSError as error:
        fail(f"{file} can't be read: {error.strerror}", code=2)
    except MemoryError:
        fail(f"{file} does not fit into this process's memory; read a part of it")
    if len(content) > _MOST_BYTES:
        fail(f"{file} has more than {_MOST_BYTES >> 20} MiB; read it in parts", code=2)
    return content


def _run(
    connection: Connection,
    content: bytes,
    question: str,
    options: ReadOptions,
    timeout: float | None,
    file: str,
) -> Reading:
    from longspan import LongspanError
    from longspan.reading import read

    async def reading() -> Reading:
        async with connection.async_client() as client, asyncio.timeout(timeout):
            return await read(client, content, question, options)

    interrupts_raise()
    try:
        return asyncio.run(reading())
    except KeyboardInterrupt:  # all requests were cancelled on the way
        raise typer.Exit(INTERRUPTED) from None
    except LongspanError as error:
        fail_call(error)
    except TimeoutError:
        fail(f"{file} was not read within {timeout:g} s; allow a longer --timeout")
    except ValueError as error:
        fail(f"{file}: {error}", code=2)
    except MemoryError:
        fail(f"{file} does not fit into this process's memory; read a part of it")


def _show(reading: Reading, file: str, citations: int) -> None:
    print(shown(reading.text, sys.stdout))
    for citation in reading.citations:
        place = shown(_place(citation, file), sys.stdout)
        print(f"\n{place}, {citation.gain:.2f} nats per token")
        print(f"  {_excerpt(citation.passage.text, reading.text)}")
    if not reading.complete:
        typer.echo("longspan: the answer ended at --max-tokens", err=True)
    if citations and not reading.citations:
        typer.echo(
            "longspan: no passage makes this answer more likely than the question by itself does; it may not "
            "be from the document",
            err=True,
        )


def _place(citation: Citation, file: str) -> str:
    one = citation.passage
    return f"{file}:{one.first_line}-{one.last_line} (bytes {one.start}-{one.end})"


def _excerpt(text: str, answer: str) -> str:
    """The line of a passage that has most of the answer's words; of a long line the part that has."""
    wanted = _words(answer)

    def shared(words: str) -> int:
        return len(wanted & _words(words))

    line = max(text.splitlines(), key=shared).strip()
    line = "".join(character if character.isprintable() else " " for character in line)
    if len(line) <= _EXCERPT:
        return line
    most = _EXCERPT - 6
    parts = [(match.start(), line[match.start() :][:most]) for match in re.finditer(r"\S+", line)]
    found = [shared(part) for _, part in parts]
    # The middle of those that share as many words: what was found does not stand at their edges.
    equal = [part for part, count in zip(parts, found, strict=True) if count == max(found)]
    start, best = equal[len(equal) // 2] if max(found) else parts[0]
    return f"{'...' * (start > 0)}{best.strip()}{'...' * (start + most < len(line))}"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _document(reading: Reading, file: str, question: str, seconds: float) -> dict[str, object]:
    cited = [
        {**dataclasses.asdict(citation.passage), "gain": citation.gain} for citation in reading.citations
    ]
    whole = dataclasses.asdict(reading) | {"citations": cited}
    return {"file": file, "question": question, **whole, "seconds": seconds}


def _stats(reading: Reading, seconds: float) -> str:
    spent = reading.spent
    parts = [
        f"{reading.used} of {reading.passages} passages of at most {reading.passage_tokens} tokens",
        f"{spent.requests} requests",
        f"{spent.prompt_tokens} prompt tokens ({spent.cached_prompt_tokens} cached)",
        f"{spent.completion_tokens} tokens",
        *([f"sent again {spent.waits} times, as the server was busy or away"] if spent.waits else []),
        f"{seconds:.1f} s",
    ]
    return ", ".join(parts)
