"""From what a request says to the tokens of its texts."""

from __future__ import annotations

from collections.abc import Sequence

from server.api import encoder_errors, errors
from server.api.errors import Violation
from server.api.state import Served
from server.text.encoder_texts import EncoderText, Input, TooLongError
from server.text.errors import TextError


def tokens_of(texts: Sequence[Input], field: str, served: Served, *, truncate: bool) -> list[EncoderText]:
    """The texts' tokens, one at least of each, all known to the model, as are their types.

    Args:
        texts: or pairs.
        field: of the request, that they come from.
        served: the model.
        truncate: cut those that are too long.

    Raises:
        ServiceError: a text can't be used.
    """
    most = served.ready.context_length
    try:
        found = served.tokenizer.encoder_texts(texts, most=most, truncate=truncate)
    except TooLongError as error:
        raise encoder_errors.text_too_long(
            f"{field}[{error.index}]", error.count, most, ", or set truncate to lose its end"
        ) from error
    except TextError as error:
        raise errors.invalid([Violation(field, str(error))]) from error
    assert served.ready.encoder is not None
    types = served.ready.encoder.token_types
    if not types:
        found = [text._replace(types=[]) for text in found]
    for index, text in enumerate(found):
        if not text.tokens:
            raise errors.invalid([Violation(f"{field}[{index}]", "has no tokens; send other characters")])
        if (
            max(text.tokens) >= served.ready.vocabulary_size
        ):  # some tokenizers know more tokens than their model
            sentence = f"has token {max(text.tokens)}, which the model does not know"
            raise errors.invalid([Violation(f"{field}[{index}]", sentence)])
        if text.types and max(text.types) >= types:
            sentence = (
                f"has tokens of type {max(text.types)}, as its tokenizer gives them, but the model's go "
                f"from 0 to {types - 1}; send both texts as one"
            )
            raise errors.invalid([Violation(f"{field}[{index}]", sentence)])
    return found
