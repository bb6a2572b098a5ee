"""Faults of texts that clients send."""

from __future__ import annotations


class TextError(ValueError):
    """A request's text can't be used; the message is a sentence for the client.

    Attributes:
        field: what is at fault, by its name in the request: ``text``, ``token_ids``, ``chat`` or part of it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class TooManyTokensError(ValueError):
    """A text has more tokens than were asked for.

    Attributes:
        count: how many it has.
        most: how many it may have.
    """

    def __init__(self, count: int, most: int) -> None:
        super().__init__(f"has {count} tokens, more than {most}")
        self.count = count
        self.most = most


def check_unicode(field: str, text: str) -> None:
    """Checks that a text can be written as UTF-8.

    Raises:
        TextError: it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            field, f"the character at index {error.start} is a lone surrogate, which no valid text has"
        ) from None
