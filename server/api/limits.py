"""The limits of requests, known before any work is done for them."""

from __future__ import annotations

from longspan.v1 import inference_pb2
from server.messages import Ready
from server.settings import Settings

# gRPC's own bound, until the model and its context are known. A context of a million token ids has 5 MB. gRPC
# holds several copies of what it receives, for each client that sends.
MOST_REQUEST_BYTES = 8 << 20
# A text of this size is always tokenized: for small contexts its tokens say more than its bytes do.
_LEAST_TEXT_BYTES = 256 << 10

_CHAT_MESSAGES = 2048
_STOP_STRING_BYTES = 1024
# Each is looked at for every token.
_STOP_TOKEN_IDS = 256
_LOGIT_BIAS = 1024

# On the wire: a number with its tag, an entry of a map, what stands before a message or a string, and names.
_ID_BYTES, _ENTRY_BYTES, _FRAME_BYTES, _OTHER_BYTES = 6, 16, 16, 4096
# Fields that a request may have beside repeated ones.
_SINGLE_FIELDS = 64


def limits(settings: Settings, ready: Ready, longest_token: int) -> inference_pb2.Limits:
    """The limits of a server with one model.

    Args:
        settings: of the server.
        ready: as the engine told of itself.
        longest_token: bytes of the longest token's text; no text of more bytes than the context has room for
            of it can be a prompt.
    """
    stop_strings, context_length = settings.max_stop_strings, ready.context_length
    text = settings.max_request_bytes or max(context_length * longest_token, _LEAST_TEXT_BYTES)
    messages = min(_CHAT_MESSAGES, context_length)
    beside = (
        2 * context_length * _ID_BYTES  # a prompt's and forced ones
        + messages * _FRAME_BYTES
        + stop_strings * (_STOP_STRING_BYTES + _FRAME_BYTES)
        + _STOP_TOKEN_IDS * _ID_BYTES
        + _LOGIT_BIAS * _ENTRY_BYTES
        + _OTHER_BYTES
    )
    most = MOST_REQUEST_BYTES if ready.encoder is not None else min(text + beside, MOST_REQUEST_BYTES)
    request = settings.max_request_bytes or most
    return inference_pb2.Limits(
        max_tokens=(context_length if ready.encoder_decoder is None else ready.encoder_decoder.target_length)
        - 1,
        # A request for more samples than the server ever admits can't succeed.
        n=min(settings.max_n, ready.max_running + settings.max_queue),
        logprobs=settings.max_logprobs,
        stop_strings=stop_strings,
        text_bytes=min(text, request),
        chat_messages=messages,
        stop_string_bytes=_STOP_STRING_BYTES,
        stop_token_ids=_STOP_TOKEN_IDS,
        logit_bias=_LOGIT_BIAS,
        request_bytes=request,
        texts=0 if ready.encoder is None else ready.max_running + settings.max_queue,
    )


def received_bytes(request_bytes: int) -> int:
    """Bytes of the largest message that gRPC reads; of a larger one it reads no more than its length.

    Of a message that is no more than twice too large the refusal can tell how much it may have.
    """
    return max(request_bytes, min(2 * request_bytes, MOST_REQUEST_BYTES))


def most_fields(limit: inference_pb2.Limits) -> int:
    """Fields that a request within the limits has: those inside a repeated message not counted."""
    repeated = (
        limit.chat_messages + limit.stop_strings + limit.stop_token_ids + limit.logit_bias + limit.texts
    )
    return repeated + _SINGLE_FIELDS
