"""Environment variables that begin like those of the server and name none of its settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

# A cluster sets these for each Service whose name begins with "longspan": addresses, and no settings.
_SERVICE_LINKS = re.compile(
    r"LONGSPAN_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")
_NEAR = 0.8  # difflib's ratio: a letter or two differ


def stray(environment: Mapping[str, str], prefix: str, known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Messages about variables that set nothing.

    Service links of Kubernetes and Docker are passed over.

    Args:
        environment: of the process.
        prefix: of the server's variables.
        known: names of variables that are read.

    Returns:
        Sentences to refuse with, about names that are nearly those of a setting; and sentences to warn with,
        about the others.
    """
    known = set(known)
    refusals, warnings = [], []
    for name in sorted(environment):
        if not name.startswith(prefix) or name in known or _SERVICE_LINKS.fullmatch(name):
            continue
        if name.endswith("_PORT") and _LINK_ADDRESS.fullmatch(environment[name]):
            continue
        if near := difflib.get_close_matches(name.removeprefix(prefix), _bare(known, prefix), 1, _NEAR):
            refusals.append(f"${name}: there is no such setting; did you mean ${prefix}{near[0]}?")
        else:
            warnings.append(f"${name} is no setting of the server and has no effect")
    return refusals, warnings


def _bare(names: Iterable[str], prefix: str) -> list[str]:
    return sorted(name.removeprefix(prefix) for name in names)
