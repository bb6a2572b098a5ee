"""Identities: who may ask, by which token or certificate, and how much; from a TOML file."""

from __future__ import annotations

import hashlib
import re
import stat
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from server.errors import RefusedError

NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
"""What an identity may be called: safe in logs, and a key of TOML."""

_HASH = re.compile(r"[0-9a-f]{64}")
# Counts stay exact as floats, and priorities have 32 bits in a request.
_BOUNDS = {
    "requests_in_flight": (1, 1 << 53),
    "tokens_per_minute": (1, 1 << 53),
    "kv_tokens": (1, 1 << 53),
    "max_priority": (-(1 << 31), (1 << 31) - 1),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """One client, or several that are one to the server.

    Attributes:
        name: in the file and in logs; empty for everyone, where no identities are asked for.
        token_sha256: hashes of its tokens, any of which it may show; in hexadecimal digits.
        certificates: common or alternative names, any of which its certificate may have.
        requests_in_flight: most requests to generate, embed or score at once; ``None``: any number.
        tokens_per_minute: tokens of prompts, texts and outputs on average; ``None``: any number.
        kv_tokens: most tokens of the KV cache that its generations in flight claim together; ``None``: any
            number.
        max_priority: highest priority that its requests may have; ``None``: any.
        metrics: whether it may read ``/metrics``, where that asks for a token.
        kv_events: whether it may read events of the KV cache, which tell the tokens of all prompts.
    """

    name: str
    token_sha256: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    requests_in_flight: int | None = None
    tokens_per_minute: int | None = None
    kv_tokens: int | None = None
    max_priority: int | None = 0
    metrics: bool = False
    kv_events: bool = False


EVERYONE = Identity("", max_priority=None, kv_events=True)
"""The identity of all requests where neither tokens nor certificates are asked for."""


def token_hash(token: str) -> str:
    """A token as the file has it. Tokens are random and long, so that a plain hash hides them."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_identities(file: Path) -> tuple[Identity, ...]:
    """The identities of a file: a table each, by its name.

    Raises:
        RefusedError: the file can't be read, or is not right; the sentence names the identity at fault. An
            empty one is not right: it may be about to be written.
    """
    try:
        # A pipe would hold up the server until something is written to it.
        if not stat.S_ISREG(file.stat().st_mode):
            raise RefusedError(f"--identities {file} is no regular file")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"--identities {file} is not valid TOML: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedError(f"--identities {file} can't be read ({reason})") from error
    if identities := parse_identities(text, file):
        return identities
    raise RefusedError(f"--identities {file} has no identities; longspan token NAME makes the first")


def parse_identities(text: str, file: Path) -> tuple[Identity, ...]:
    """The identities of a file's text, which may be none.

    Raises:
        RefusedError: the text is not right; the sentence names the file and the identity at fault.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"--identities {file} is not valid TOML: {error}") from error
    try:
        identities = tuple(_identity(name, table) for name, table in tables.items())
        _check_unique(identities)
    except ValueError as error:
        raise RefusedError(f"--identities {file}: {error}") from error
    return identities


def _identity(name: str, table: Any) -> Identity:
    if not isinstance(table, dict):
        raise ValueError(f"{name!r} stands outside a table; write each identity as [NAME]")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: it takes up to 64 letters, digits and . _ @ -")
    known = {field.name for field in fields(Identity)} - {"name"}
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"[{name}] has no {unknown[0]!r}; it may have {', '.join(sorted(known))}")
    values: dict[str, Any] = dict(table)
    for key in ("token_sha256", "certificates"):
        found = table.get(key, [])
        if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
            raise ValueError(f"[{name}] {key} is not a list of texts")
        values[key] = tuple(found)
    for each in values["token_sha256"]:
        if not _HASH.fullmatch(each):
            raise ValueError(
                f"[{name}] token_sha256 has an entry that is not 64 hexadecimal digits, lower case"
            )
        if each == token_hash(""):
            raise ValueError(f"[{name}] token_sha256 has the hash of an empty token")
    for key, (least, most) in _BOUNDS.items():
        if key in table and not (type(table[key]) is int and least <= table[key] <= most):
            raise ValueError(f"[{name}] {key} is not a whole number from {least} to {most}")
    for key in ("metrics", "kv_events"):
        if type(table.get(key, False)) is not bool:
            raise ValueError(f"[{name}] {key} is neither true nor false")
    if not values["token_sha256"] and not values["certificates"]:
        raise ValueError(f"[{name}] has neither token_sha256 nor certificates, so that nothing proves it")
    return Identity(name, **values)


def _check_unique(identities: tuple[Identity, ...]) -> None:
    owners: dict[str, str] = {}
    for identity in identities:
        for proof in (*identity.token_sha256, *identity.certificates):
            if owners.setdefault(proof, identity.name) != identity.name:
                raise ValueError(
                    f"[{owners[proof]}] and [{identity.name}] have the same token or certificate"
                )
