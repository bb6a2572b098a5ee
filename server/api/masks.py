"""Masks of texts: looked for before they are computed, and filled afterwards."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from longspan.v1 import encoder_pb2, inference_pb2, types_pb2
from server.api import errors
from server.api.encoder_inputs import tokens_of
from server.api.encoding import Encoded
from server.api.errors import Violation
from server.api.state import Served
from server.text.encoder_texts import EncoderText

_USUAL = 5
# Tokens of a whole answer, at most: each is a message, and other requests wait while they are written.
_MOST_TOKENS = 8192


def top_k_of(request: encoder_pb2.FillMaskRequest, limit: inference_pb2.Limits) -> int:
    """How many tokens a request asks for, of each mask."""
    return request.top_k if request.HasField("top_k") else min(_USUAL, limit.logprobs) or 1


def masked_texts(texts: Sequence[str], served: Served, *, truncate: bool, top_k: int) -> list[EncoderText]:
    """The texts' tokens, one mask at least among those of each.

    Args:
        texts: with masks spelled out.
        served: the model.
        truncate: cut those that are too long.
        top_k: tokens to be told of each mask.

    Raises:
        ServiceError: a text can't be used, or the answer would be too large.
    """
    found = tokens_of(list(texts), "texts", served, truncate=truncate)
    total = 0
    for index, text in enumerate(found):
        count = text.tokens.count(mask_id(served))
        if not count:
            spelled = served.tokenizer.mask_token
            sentence = f"has no mask; put {spelled} where a token is to be found"
            if text.truncated:
                sentence = f"has no mask among the {len(text.tokens)} tokens that truncate leaves; shorten it"
            raise errors.invalid([Violation(f"texts[{index}]", sentence)])
        total += top_k * count
    if total > _MOST_TOKENS:
        sentence = (
            f"asks for {total} tokens for all masks together; at most {_MOST_TOKENS} are sent, so ask "
            "for fewer, or send fewer texts"
        )
        raise errors.invalid([Violation("top_k", sentence)])
    return found


def mask_id(served: Served) -> int:
    """The token of a mask; the model fills masks."""
    assert served.tokenizer.mask_token is not None  # else it has no such task
    return served.tokenizer.special_tokens[served.tokenizer.mask_token]


def filled_texts(encoded: Encoded, served: Served, top_k: int) -> list[encoder_pb2.FilledText]:
    """The engine's tokens, as messages."""
    mask, text_of = mask_id(served), served.tokenizer.token_text
    filled = []
    for text, output in zip(encoded.texts, encoded.outputs, strict=True):
        tops = zip(output.tokens, array("f", output.values), strict=True)
        masks = [
            encoder_pb2.FilledMask(
                position=position,
                tokens=[
                    types_pb2.TokenLogprob(token_id=found, text=text_of(found), logprob=logprob, rank=rank)
                    for rank, (found, logprob) in zip(range(1, top_k + 1), tops, strict=False)
                ],
            )
            for position, token in enumerate(text.tokens)
            if token == mask
        ]
        filled.append(encoder_pb2.FilledText(masks=masks, tokens=len(text.tokens), truncated=text.truncated))
    return filled
