"""``longspan embed``: vectors of texts, or how similar the texts are."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer

from server.cli.connection import Connection, connected
from server.cli.lines import read_texts
from server.cli.shared import UNBROKEN, fail, fail_call
from server.cli.terminal import shown

if TYPE_CHECKING:
    from longspan.v1.encoder_pb2 import EmbedResponse


_FIGURE = 8  # columns before a text


@connected
def embed(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT", help="The texts; - reads one from each line of standard input that is not blank."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Name of the model. Without it: the server's only one.")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="mean|cls|last", help="How a text's vectors become one. Without it: the model's way."
        ),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model's prompt with which texts begin, such as query; empty for none. Without "
            "it: the model's usual one."
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long; without it they are refused.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the vectors: a JSON object for each text.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds for the answer.")] = None,
    *,
    connection: Connection,
) -> None:
    """Print how similar texts are to the first of them.

    By the cosine of their embeddings; with --json the embeddings.
    """
    from longspan import EmbedOptions, LongspanError

    several = read_texts(texts)
    if pooling == "none":
        fail("--pooling none gives a vector for each token; ask for these from Python: client.embed", code=2)
    given = {
        **{"model": model, "pooling": pooling, "prompt_name": prompt_name},
        "truncate": truncate or None,
    }
    options = cast(EmbedOptions, {name: value for name, value in given.items() if value is not None})
    with connection.client(timeout) as client:
        try:
            response = client.embed(several, **options)
        except LongspanError as error:
            fail_call(error)
    if as_json:
        for text, embedding in zip(several, response.embeddings, strict=True):
            document = json.dumps({"text": text, "embedding": list(embedding.values)}, ensure_ascii=False)
            print(shown(document, sys.stdout))
    else:
        _print_similarities(several, response)


def _print_similarities(texts: list[str], response: EmbedResponse) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNBROKEN
    vectors = [embedding.values for embedding in response.embeddings]
    for text, vector in zip(texts, vectors, strict=True):
        print(f"{_cosine(vectors[0], vector):6.3f}  {_in_a_row(text, width - _FIGURE)}")


def _in_a_row(text: str, room: int) -> str:
    """A text with its line breaks escaped, cut to ``room`` characters."""
    row = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[: room + 1])
    return row if len(row) <= room else f"{row[: room - 3]}..."


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    lengths = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return product / lengths if lengths else 0.0
