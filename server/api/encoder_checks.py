"""The fields of requests to encoders held to what they may be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from longspan.v1 import encoder_pb2, inference_pb2
from server.api import encoder_errors
from server.api.checks import Violations, check_request_id, check_token_ids, refuse
from server.api.errors import Violation, quote
from server.messages import Ready


def check_embed(request: encoder_pb2.EmbedRequest, ready: Ready, limit: inference_pb2.Limits) -> None:
    """Checks what can be known of a request before its texts are tokenized.

    Raises:
        ServiceError: with the fields at fault, or that token ids are too many.
    """
    refuse(chain(_inputs(request, ready, limit), _prompt_name(request, ready), _others(request)))
    for index, ids in enumerate(request.token_ids):
        if len(ids.ids) > ready.context_length:
            field = f"token_ids[{index}].ids"
            raise encoder_errors.text_too_long(field, len(ids.ids), ready.context_length)


def check_fill_mask(
    request: encoder_pb2.FillMaskRequest, top_k: int, ready: Ready, limit: inference_pb2.Limits
) -> None:
    """Checks what can be known of a request before its texts are tokenized.

    Raises:
        ServiceError: with the fields at fault.
    """
    texts = _texts("texts", request.texts, limit)
    refuse(chain(texts, _top_k(top_k, ready, limit), check_request_id(request.request_id)))


def check_score(request: encoder_pb2.ScoreRequest, limit: inference_pb2.Limits) -> None:
    """Checks what can be known of a request before its texts are tokenized.

    Raises:
        ServiceError: with the fields at fault.
    """
    refuse(chain(_pairs(request, limit), check_request_id(request.request_id)))


def _pairs(request: encoder_pb2.ScoreRequest, limit: inference_pb2.Limits) -> Violations:
    count = len(request.inputs)
    if not count:
        yield Violation("inputs", "is empty; send at least one text or pair")
    if count > limit.texts:
        yield _too_many("inputs", count, limit)
        return
    for index, one in enumerate(request.inputs):
        for name in ("text", "pair") if one.HasField("pair") else ("text",):
            yield from _text(f"inputs[{index}].{name}", getattr(one, name), limit.text_bytes)


def _too_many(field: str, count: int, limit: inference_pb2.Limits) -> Violation:
    return Violation(field, f"has {count} texts; this server takes {limit.texts} at most in a request")


def _text(field: str, text: str, most: int) -> Violations:
    size = len(text.encode())
    if not text:
        yield Violation(field, "is empty; send at least one character")
    elif size > most:
        yield Violation(field, f"has {size} bytes; this server takes {most} at most, so shorten it")


def _top_k(top_k: int, ready: Ready, limit: inference_pb2.Limits) -> Violations:
    most = min(limit.logprobs, ready.vocabulary_size)
    if top_k > most:
        yield Violation("top_k", f"is {top_k}; this server tells {most} tokens of a mask at most")
    elif not top_k:
        yield Violation("top_k", "is 0; ask for at least one token of a mask")


def _texts(field: str, texts: Sequence[str], limit: inference_pb2.Limits) -> Violations:
    if not texts:
        yield Violation(field, "is empty; send at least one text")
    if len(texts) > limit.texts:
        yield _too_many(field, len(texts), limit)
        return
    for index, text in enumerate(texts):
        yield from _text(f"{field}[{index}]", text, limit.text_bytes)


def _inputs(request: encoder_pb2.EmbedRequest, ready: Ready, limit: inference_pb2.Limits) -> Violations:
    if bool(request.texts) == bool(request.token_ids):
        what = "and token_ids are both set" if request.texts else "is empty"
        yield Violation("texts", f"{what}; send texts or token_ids, at least one")
        return
    if request.texts:
        yield from _texts("texts", request.texts, limit)
        return
    if (count := len(request.token_ids)) > limit.texts:
        yield _too_many("token_ids", count, limit)
        return
    for index, ids in enumerate(request.token_ids):
        if not ids.ids:
            yield Violation(f"token_ids[{index}].ids", "is empty; send at least one token id")
        elif len(ids.ids) <= ready.context_length:  # more are refused as too long a text
            yield from check_token_ids(f"token_ids[{index}].ids", ids.ids, ready.vocabulary_size)


def _prompt_name(request: encoder_pb2.EmbedRequest, ready: Ready) -> Violations:
    name = request.prompt_name
    if not name:
        return
    assert ready.encoder is not None
    if request.token_ids:
        yield Violation("prompt_name", "is for texts; token ids are taken as they are")
    elif name not in (known := ready.encoder.prompts):
        instead = f"it knows {', '.join(map(quote, known))}" if known else "it has none, so leave it out"
        yield Violation("prompt_name", f"is {quote(name)}, which is no prompt of this model; {instead}")


def _others(request: encoder_pb2.EmbedRequest) -> Violations:
    if request.token_ids and request.truncate:
        yield Violation("truncate", "is for texts; token ids are taken as they are")
    if request.pooling not in encoder_pb2.Pooling.values():
        yield Violation("pooling", f"is {request.pooling}, which no pooling has; see encoder.proto")
    yield from check_request_id(request.request_id)
