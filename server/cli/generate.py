"""``longspan generate``: one prompt, its answer on standard output as it is made."""

from __future__ import annotations

import json
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Self, cast

import typer

from server.cli.connection import Connection, connected
from server.cli.shared import fail, fail_call
from server.cli.signals import INTERRUPTED, interrupts_end
from server.cli.terminal import shown

if TYPE_CHECKING:
    from longspan import Stream
    from longspan.v1.types_pb2 import Timings, Usage


@connected
def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template, with PROMPT as the user's turn.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system's turn before it, with --chat.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model. Without it: the server's only one.")
    ] = None,
    special_tokens_as_text: Annotated[
        bool,
        typer.Option("--as-text", help="Special tokens spelled out in PROMPT stay text."),
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to generate. Without it: what the server allows.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 takes the most likely token. Without it, or the next three: the server's default."
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens whose probabilities sum to this.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens less likely than this share of the most likely one's probability."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same request, same tokens.")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher is served sooner. Without it: 0.")] = None,
    source_language: Annotated[
        str | None, typer.Option(help="Language of PROMPT, for a model with tokens for languages: en, en_XX.")
    ] = None,
    target_language: Annotated[str | None, typer.Option(help="Language of the output, likewise.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, usage and timings at the end.")
    ] = False,
    stats: Annotated[
        bool | None,
        typer.Option(
            help="Tokens and speed on standard error.", show_default="where standard error is a terminal"
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds for the whole answer.")] = None,
    *,
    connection: Connection,
) -> None:
    """Generate text, streamed to standard output as it appears.

    Ctrl-C ends the request on the server too.
    """
    from longspan import GenerateOptions, LongspanError

    text = _read_standard_input() if prompt == "-" else prompt
    if system is not None and not chat:
        fail("--system needs --chat: only a chat template has a place for it", code=2)
    roles = [("system", system)] if system is not None else []
    given = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "priority": priority,
        "stop": stop,
        "source_language": source_language,
        "target_language": target_language,
        "special_tokens_as_text": special_tokens_as_text or None,
    }
    options = cast(GenerateOptions, {name: value for name, value in given.items() if value is not None})
    with connection.client(timeout) as client, _Interrupt() as interrupt:
        try:
            stream = client.stream([*roles, ("user", text)] if chat else text, **options)
            interrupt.closes(stream)
            answer = _read(stream, show=not as_json)
        except LongspanError as error:
            if interrupt.happened:
                raise typer.Exit(INTERRUPTED) from None
            fail_call(error)
    if stream.usage is None or stream.timings is None:
        fail("the server ended the stream without its last message; its log may say why")
    if as_json:
        _print_json(stream, answer, stream.usage, stream.timings)
    if sys.stderr.isatty() if stats is None else stats:
        typer.echo(_stats(stream.usage, stream.timings), err=True)


class _Interrupt:
    """Ctrl-C closes the stream, which ends the request on the server; a second one ends the program.

    As an exception it could interrupt gRPC at any instruction and leave its locks in disorder.
    """

    def __init__(self) -> None:
        self.happened = False
        self._stream: Stream | None = None

    def closes(self, stream: Stream) -> None:
        """Names the stream."""
        self._stream = stream
        if self.happened:
            stream.close()

    def __enter__(self) -> Self:
        signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        interrupts_end()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        interrupts_end()
        self.happened = True
        if self._stream is not None:
            self._stream.close()


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        fail(f"standard input is not UTF-8 text: {error}")


def _read(stream: Stream, show: bool) -> str:
    """The whole text; written to standard output as it comes where it is to be shown."""
    texts: list[str] = []
    try:
        for delta in stream:
            texts.append(delta.text)
            if show and delta.text:
                sys.stdout.write(shown(delta.text, sys.stdout))
                sys.stdout.flush()
    finally:  # an error has a line of its own
        if show and sys.stdout.isatty() and any(texts) and not "".join(texts).endswith("\n"):
            sys.stdout.write("\n")
    return "".join(texts)


def _print_json(stream: Stream, text: str, usage: Usage, timings: Timings) -> None:
    from google.protobuf.json_format import MessageToDict

    tokens, seconds = (
        MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for message in (usage, timings)
    )
    document = {
        "request_id": stream.request_id,
        "model": stream.model,
        "text": text,
        "finish_reason": stream.finish_reason,
        "usage": tokens,
        "timings": seconds,
    }
    print(shown(json.dumps(document, ensure_ascii=False), sys.stdout))


def _stats(usage: Usage, timings: Timings) -> str:
    """One line: tokens, speed between the first and the last of them, time to the first."""
    tokens = usage.completion_tokens
    parts = [f"{usage.prompt_tokens} prompt tokens ({usage.cached_prompt_tokens} cached)", f"{tokens} tokens"]
    if tokens > 1 and timings.decode_seconds > 0:
        parts.append(f"{(tokens - 1) / timings.decode_seconds:.1f} tokens/s")
    if usage.draft_tokens:
        parts.append(f"{usage.accepted_draft_tokens} of {usage.draft_tokens} drafts accepted")
    parts.append(f"first token after {timings.time_to_first_token_seconds * 1000:.0f} ms")
    return ", ".join(parts)
