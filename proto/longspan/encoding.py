"""Requests to encoders from keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, get_args

from longspan.errors import InvalidRequestError, Violation
from longspan.request import NO_LISTS
from longspan.v1 import encoder_pb2

Texts = str | Sequence[str] | Sequence[Sequence[int]]
"""A text, several texts, or several texts as token ids."""


PoolingName = Literal["mean", "cls", "last", "none"]


class EmbedOptions(TypedDict, total=False):
    """Keyword arguments of ``embed``; those left out have the defaults of the model's makers.

    Attributes:
        model: its name; the server's only model if left out.
        pooling: how the vectors of a text's tokens become one; ``none`` for one vector for each token.
        normalize: vectors have length 1.
        truncate: texts that are too long are cut at their end; without it they are refused.
        prompt_name: of the model's prompts the one with which texts begin, such as ``query``; empty for none.
        request_id: a name of your own, for ``abort`` and logs.
    """

    model: str
    pooling: PoolingName
    normalize: bool
    truncate: bool
    prompt_name: str
    request_id: str


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of ``score``.

    Attributes:
        model: its name; the server's only model if left out.
        truncate: inputs that are too long are cut, of a pair the longer text first; else they are refused.
        request_id: a name of your own, for ``abort`` and logs.
    """

    model: str
    truncate: bool
    request_id: str


class FillMaskOptions(TypedDict, total=False):
    """Keyword arguments of ``fill_mask``.

    Attributes:
        model: its name; the server's only model if left out.
        top_k: how many tokens to tell for each mask; 5 if left out.
        truncate: texts that are too long are cut at their end, masks there are lost; else they are refused.
        request_id: a name of your own, for ``abort`` and logs.
    """

    model: str
    top_k: int
    truncate: bool
    request_id: str


def build_fill_mask(texts: str | Sequence[str], options: FillMaskOptions) -> encoder_pb2.FillMaskRequest:
    """The request for texts and the options given; one that is ``None`` counts as not given.

    Raises:
        InvalidRequestError: a value does not fit its field's type; the server checks the rest.
        TypeError: an option does not exist.
    """
    request = encoder_pb2.FillMaskRequest()
    try:
        request.texts.extend([texts] if isinstance(texts, str) else texts)
    except (TypeError, ValueError) as error:
        sentence = f"must be texts: {error}"
        raise InvalidRequestError(f"texts: {sentence}", violations=[Violation("texts", sentence)]) from error
    _set_options(request, options, FillMaskOptions)
    return request


def build_score(inputs: Sequence[str | tuple[str, str]], options: ScoreOptions) -> encoder_pb2.ScoreRequest:
    """The request for texts or pairs and the options given; one that is ``None`` counts as not given.

    Raises:
        InvalidRequestError: a value does not fit its field's type; the server checks the rest.
        TypeError: an option does not exist, or the inputs are no list.
    """
    request = encoder_pb2.ScoreRequest()
    if isinstance(inputs, (str, *NO_LISTS)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs are a list of texts, or of pairs of texts, not {type(inputs).__name__}")
    for index, one in enumerate(inputs):
        try:
            text, pair = (one, None) if isinstance(one, str) else _listed(one)
            request.inputs.add(text=text, pair=pair)
        except (TypeError, ValueError) as error:
            raise _refusal(f"inputs[{index}]", "a text or a pair of texts", one, error) from error
    _set_options(request, options, ScoreOptions)
    return request


def build_embed(texts: Texts, options: EmbedOptions) -> encoder_pb2.EmbedRequest:
    """The request for texts and the options given; one that is ``None`` counts as not given.

    Raises:
        InvalidRequestError: a value does not fit its field's type; the server checks the rest.
        TypeError: an option does not exist, or the texts are no list.
    """
    request = encoder_pb2.EmbedRequest()
    set_texts(request, texts)
    _set_options(request, options, EmbedOptions)
    return request


def _set_options(request: Any, options: Any, kind: Any) -> None:
    known = kind.__annotations__
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"there is no option {', '.join(unknown)}; the options are {', '.join(known)}")
    for option, value in options.items():
        if value is None:
            continue
        try:
            if option == "pooling":
                if value not in (names := get_args(PoolingName)):
                    raise ValueError(f"is {value!r}; it must be one of {', '.join(names)}")
                value = encoder_pb2.Pooling.Value(f"POOLING_{value.upper()}")
            setattr(request, option, value)
        except (TypeError, ValueError) as error:
            violation = Violation(option, str(error))
            raise InvalidRequestError(str(violation), violations=[violation]) from error


def set_texts(request: Any, texts: Texts) -> None:
    """Sets ``texts`` or ``token_ids``.

    Raises:
        InvalidRequestError: one of them is not a text, or the token ids of one.
        TypeError: they are no list.
    """
    if isinstance(texts, NO_LISTS) or not isinstance(texts, Iterable):
        raise TypeError(f"texts are a text, a list of texts, or of token ids, not {type(texts).__name__}")
    several = [texts] if isinstance(texts, str) else list(texts)
    are_texts = all(isinstance(text, str) for text in several)
    for index, one in enumerate(several):
        try:
            if are_texts:
                request.texts.append(one)
            else:
                request.token_ids.add(ids=_listed(one))
        except (TypeError, ValueError) as error:
            raise _refusal(
                f"texts[{index}]", "a text, as all are, or a list of token ids", one, error
            ) from error


def _listed(value: Any) -> Any:
    if isinstance(value, NO_LISTS):
        raise TypeError
    return value


def _refusal(field: str, wanted: str, value: object, error: Exception) -> InvalidRequestError:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    violation = Violation(field, f"{text} is not {wanted}{f': {error}' if str(error) else ''}")
    return InvalidRequestError(str(violation), violations=[violation])
