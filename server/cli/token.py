"""``longspan token``: a new token for an identity, and its entry in the file that the server reads."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from server.cli.shared import fail

# Says what it is where it is found, to people and to scanners for secrets; then 256 random bits.
_PREFIX = "longspan_"
_BYTES = 32


def token(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The identity: letters, digits and . _ @ -, up to 64.")
    ],
    file: Annotated[
        Path | None,
        typer.Option(
            "--identities",
            # Not from the environment: without the flag no file is touched, also where a server's is named.
            help="File to add a new identity to. Without it: its entry is printed on standard error.",
        ),
    ] = None,
) -> None:
    """Make a token, and print it. It is shown only now: files hold its hash."""
    from server.access.identities import NAME, parse_identities, read_identities, token_hash
    from server.errors import RefusedError

    if not NAME.fullmatch(name):
        fail(f"{name!r} is no name of an identity: it takes up to 64 letters, digits and . _ @ -", code=2)
    made = _PREFIX + secrets.token_urlsafe(_BYTES)
    digest = token_hash(made)
    table = f'["{name}"]\ntoken_sha256 = ["{digest}"]\n'
    if file is None:
        typer.echo(f"Add to the file of --identities:\n\n{table}\nand give the client this token:", err=True)
    else:
        try:
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            known = parse_identities(text, file)
            if any(identity.name == name for identity in known):
                # The token that would fit the entry is not shown: a run without a file shows both.
                fail(
                    f"{file} has {name} already; for another token run this without --identities, and add "
                    "the hash to its token_sha256, where the old one may stay until all clients have changed"
                )
            begin = "" if text.endswith("\n") or not text else "\n"
            added = f"{begin}\n{table}" if text else table
            parse_identities(text + added, file)
            with file.open("a", encoding="utf-8") as writing:
                writing.write(added)
            if not any(digest in identity.token_sha256 for identity in read_identities(file)):
                fail(f"{file} was written by another at the same time and lacks {name}; run this again")
        except RefusedError as error:
            fail(str(error))
        except UnicodeDecodeError as error:
            fail(f"{file} is not valid TOML: {error}")
        except OSError as error:
            fail(f"{file} can't be written ({error.strerror or error})")
        typer.echo(f"{name} was added to {file}. Its token:", err=True)
    typer.echo(made)
