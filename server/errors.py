"""The exception of every refusal, below all of the server's packages."""

from __future__ import annotations


class RefusedError(Exception):
    """Something about the model, the machine or the settings makes serving impossible.

    The message is a sentence for the operator, with what to do about it. Shown without a traceback.
    """
