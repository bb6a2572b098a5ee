"""``longspan fill``: the most likely tokens for the masks of texts."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, cast

import typer

from server.cli.connection import Connection, connected
from server.cli.lines import read_texts
from server.cli.shared import fail_call
from server.cli.terminal import shown


@connected
def fill(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Texts with masks, spelled as the model has them, such as [MASK] or <mask>; - reads one "
            "from each line of standard input.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Name of the model. Without it: the server's only one.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Tokens to print for each mask. Without it: 5.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long; without it they are refused.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each mask.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds for the answer.")] = None,
    *,
    connection: Connection,
) -> None:
    """Print the most likely tokens for each mask of a text."""
    from longspan import FillMaskOptions, LongspanError

    several = read_texts(texts)
    given = {"model": model, "top_k": top_k, "truncate": truncate or None}
    options = cast(FillMaskOptions, {name: value for name, value in given.items() if value is not None})
    with connection.client(timeout) as client:
        try:
            response = client.fill_mask(several, **options)
        except LongspanError as error:
            fail_call(error)
    for text, filled in zip(several, response.texts, strict=True):
        for index, mask in enumerate(filled.masks):
            found = [(token.token_id, token.text, math.exp(token.logprob)) for token in mask.tokens]
            if as_json:
                tokens = [dict(zip(("id", "text", "probability"), each, strict=True)) for each in found]
                document = json.dumps({"text": text, "mask": index, "tokens": tokens}, ensure_ascii=False)
                print(shown(document, sys.stdout))
                continue
            print(shown(text, sys.stdout) + ("" if len(filled.masks) == 1 else f"  (mask {index + 1})"))
            for _, spelled, probability in found:
                print(f"{probability:6.3f}  {shown(spelled.strip(), sys.stdout)}")
