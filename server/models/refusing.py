"""Failures of a model at start-up, as sentences to the operator."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from attention.backends import UnsupportedError
from server.errors import RefusedError

log = logging.getLogger("longspan.models")


@contextmanager
def refusing(what: str, doing: str, otherwise: str = "") -> Iterator[None]:
    """Turns every exception of a model that was not made for this into a refusal in one sentence.

    Args:
        what: the model.
        doing: what is being done with it.
        otherwise: other remedies than choosing another model, to follow that.

    Raises:
        RefusedError: something was raised.
    """
    try:
        yield
    except RefusedError:
        raise
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error
    except Exception as error:
        log.debug("%s of %s failed", doing, what, exc_info=True)
        raise RefusedError(
            f"{what} cannot be served: {doing} fails with {type(error).__name__}: {sentence(error)}; "
            f"choose another model{otherwise}"
        ) from error


def other_kernels(kernel: str) -> str:
    """The attention kernels to try where ``kernel`` fails, to follow "choose another model"; maybe empty."""
    simpler = ["sdpa", "reference"]
    if kernel in simpler:
        simpler = simpler[simpler.index(kernel) + 1 :]
    return f", or try --kernel {' or '.join(simpler)}" if simpler else ""


def sentence(error: Exception) -> str:
    """An exception's message in one line, without the place in torch's code that raised it."""
    message = str(error).partition("Exception raised from")[0]
    return " ".join(message.split()) or type(error).__name__
