"""What goes wrong with a model at start-up, as a sentence to an operator."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from attention.backends import UnsupportedError
from server.errors import RefusedError

log = logging.getLogger("longspan.models")


@contextmanager
def refusing(what: str, doing: str) -> Iterator[None]:
    """Whatever a model that was not made for this trips over becomes a refusal in one sentence.

    Args:
        what: the model.
        doing: what is being done with it.

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
            "choose another model"
        ) from error


def sentence(error: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
