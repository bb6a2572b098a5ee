"""File descriptors: the process may open a limited number, and connections must leave enough for all else."""

from __future__ import annotations

import logging
import resource

from server.errors import RefusedError

log = logging.getLogger("longspan.server")

RESERVED = 256
"""For connections to the metrics (64), the links to other processes, traces and files: some 30 at rest."""

_FEWEST = 16


def connections_allowed(wanted: int) -> int:
    """Raises the process's own limit as far as is needed and allowed, and warns where that is too little.

    Args:
        wanted: connections to the gRPC service, at most.

    Returns:
        How many of them leave ``RESERVED`` descriptors.

    Raises:
        RefusedError: hardly any.
    """
    needed = wanted + RESERVED
    soft, hard = (
        needed if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    limit = max(soft, min(needed, hard))
    allowed = min(wanted, limit - RESERVED)
    remedy = f"raise the limit of open files (ulimit -n {needed}, LimitNOFILE, or --ulimit nofile)"
    if allowed < min(wanted, _FEWEST):
        raise RefusedError(
            f"the process may open {limit} files, of which the server itself takes up to {RESERVED}; {remedy}"
        )
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if allowed < wanted:
        log.warning(
            "the process may open %d files, so that gRPC takes %d connections at most instead of %d "
            "(--max-connections); %s",
            *(limit, allowed, wanted, remedy),
        )
    return allowed
