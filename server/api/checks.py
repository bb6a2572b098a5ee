"""Every field of a request held to what it may be: counts and sizes first, then values.

The checks yield what is wrong one by one, and no more is looked at than is told. So a request costs no more
than its limits allow, however many of its elements are wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from longspan.v1 import inference_pb2, types_pb2
from server.api import errors
from server.api.errors import Violation, quote
from server.ranges import RANGES

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_MOST_BIAS = 100.0
_MOST_NGRAM = 64

Violations = Iterator[Violation]


def valid_request_id(request_id: str) -> bool:
    """Whether a request may be called that: up to 128 characters that are safe in headers and logs."""
    return _REQUEST_ID.fullmatch(request_id) is not None


def check(
    request: inference_pb2.GenerateRequest, vocabulary: int, limit: inference_pb2.Limits, longest: int
) -> None:
    """Checks what can be known of a request before its prompt is tokenized.

    Args:
        request: as it came.
        vocabulary: number of logits.
        limit: what requests are held to.
        longest: tokens of a prompt, at most.

    Raises:
        ServiceError: with the fields at fault, or that a prompt of token ids is too long.
    """
    found = chain(
        _prompt(request, vocabulary, limit, longest),
        _sampling(request.sampling, vocabulary, limit.logit_bias),
        _stop(request.stop, vocabulary, limit),
        _logprobs(request.logprobs, limit.logprobs),
        _forced(request, vocabulary, limit.max_tokens),
        _others(request, limit.n),
    )
    refuse(found)
    if len(request.token_ids.ids) > longest:
        raise errors.prompt_too_long("token_ids", len(request.token_ids.ids), longest)


def refuse(found: Iterable[Violation]) -> None:
    """Looks for what is wrong, and no further than an answer can tell.

    Raises:
        ServiceError: with what was found.
    """
    told = list(islice(found, errors.MOST_VIOLATIONS + 1))
    if told:
        raise errors.invalid(told)


def check_text(text: str, most: int) -> Violations:
    """Whether a text has more bytes than a prompt can have."""
    size = len(text.encode())
    if size > most:
        yield Violation("text", f"has {size} bytes; this server takes {most} at most, so shorten it")


def check_chat(chat: types_pb2.Chat, limit: inference_pb2.Limits) -> Violations:
    """The faults of a conversation that no template could take."""
    count = len(chat.messages)
    if not count:
        yield Violation("chat.messages", "is empty; send at least one message")
    if count > limit.chat_messages:
        sentence = f"has {count} messages; this server takes {limit.chat_messages} at most"
        yield Violation("chat.messages", sentence)
        return
    size = sum(len(message.role.encode()) + len(message.content.encode()) for message in chat.messages)
    if size > limit.text_bytes:
        sentence = (
            f"has {size} bytes of roles and contents; this server takes {limit.text_bytes} at most, so "
            "shorten it"
        )
        yield Violation("chat.messages", sentence)
    for index, message in enumerate(chat.messages):
        if not message.role:
            yield Violation(f"chat.messages[{index}].role", "is empty; name who speaks, such as user")


def check_token_ids(field: str, ids: Sequence[int], vocabulary: int) -> Violations:
    """Ids that the model doesn't have."""
    if max(ids, default=0) < vocabulary:
        return
    for index, id_ in enumerate(ids):
        if id_ >= vocabulary:
            sentence = f"is {id_}; the model's token ids go from 0 to {vocabulary - 1}"
            yield Violation(f"{field}[{index}]", sentence)


def check_request_id(request_id: str) -> Violations:
    """Whether a name that is given can be one."""
    if request_id and not valid_request_id(request_id):
        allowed = "1 to 128 letters, digits and . _ : / + = @ -"
        yield Violation("request_id", f"is {quote(request_id)}; it may have {allowed}")


def _prompt(
    request: inference_pb2.GenerateRequest, vocabulary: int, limit: inference_pb2.Limits, longest: int
) -> Violations:
    kind = request.WhichOneof("prompt")
    ids = request.token_ids.ids
    if kind is None:
        yield Violation("prompt", "is not set; send text, token_ids or chat")
    elif kind == "chat":
        yield from check_chat(request.chat, limit)
    elif kind == "text" and not request.text:
        yield Violation("text", "is empty; send at least one character")
    elif kind == "text":
        yield from check_text(request.text, limit.text_bytes)
    elif not ids:
        yield Violation("token_ids.ids", "is empty; send at least one token id")
    elif request.special_tokens_as_text:
        sentence = "is for text and chat; token ids are taken as they are"
        yield Violation("special_tokens_as_text", sentence)
    elif len(ids) <= longest:  # more are refused as too long a prompt
        yield from check_token_ids("token_ids.ids", ids, vocabulary)


def _sampling(sampling: types_pb2.SamplingParams, vocabulary: int, most_bias: int) -> Violations:
    for name, (words, inside) in RANGES.items():
        value = getattr(sampling, name)
        if sampling.HasField(name) and not (math.isfinite(value) and inside(value)):
            yield Violation(f"sampling.{name}", f"is {value:g}; it must be a number {words}")
    entries = len(sampling.logit_bias)
    if entries > most_bias:
        yield Violation(
            "sampling.logit_bias", f"has {entries} entries; this server takes {most_bias} at most"
        )
        return
    for token, bias in sorted(sampling.logit_bias.items()):
        field = f"sampling.logit_bias[{token}]"
        if token >= vocabulary:
            sentence = f"names token {token}; the model's token ids go from 0 to {vocabulary - 1}"
            yield Violation(field, sentence)
        if not abs(bias) <= _MOST_BIAS:  # the comparison is false for NaN
            yield Violation(field, f"is {bias:g}; it must be a number from -100 to 100")


def _stop(stop: types_pb2.StopConditions, vocabulary: int, limit: inference_pb2.Limits) -> Violations:
    ids, strings = len(stop.stop_token_ids), len(stop.stop_strings)
    if ids > limit.stop_token_ids:
        yield Violation("stop.stop_token_ids", f"has {ids} ids; at most {limit.stop_token_ids} are taken")
    else:
        yield from check_token_ids("stop.stop_token_ids", stop.stop_token_ids, vocabulary)
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        yield Violation("stop.max_tokens", "is 0; ask for at least 1 token")
    elif stop.HasField("max_tokens") and stop.min_tokens > stop.max_tokens:
        sentence = f"is {stop.min_tokens}, more than max_tokens, {stop.max_tokens}"
        yield Violation("stop.min_tokens", sentence)
    if strings > limit.stop_strings:
        sentence = f"has {strings} strings; this server takes {limit.stop_strings} at most"
        yield Violation("stop.stop_strings", sentence)
        return
    for index, text in enumerate(stop.stop_strings):
        field, size = f"stop.stop_strings[{index}]", len(text.encode())
        if not text:
            yield Violation(field, "is empty; every output would match it, so leave it out")
        elif size > limit.stop_string_bytes:
            yield Violation(field, f"has {size} bytes; at most {limit.stop_string_bytes} are taken")


def _logprobs(logprobs: types_pb2.LogprobParams, most: int) -> Violations:
    for name in ("output", "prompt"):
        if logprobs.HasField(name) and getattr(logprobs, name) > most:
            sentence = f"is {getattr(logprobs, name)}; this server gives {most} at most"
            yield Violation(f"logprobs.{name}", sentence)


def _forced(request: inference_pb2.GenerateRequest, vocabulary: int, most: int) -> Violations:
    forced, stop = len(request.forced_token_ids), request.stop
    if forced > most:
        sentence = f"has {forced} ids; this model's context has room for {most} beside a prompt"
        yield Violation("forced_token_ids", sentence)
        return
    yield from check_token_ids("forced_token_ids", request.forced_token_ids, vocabulary)
    if stop.HasField("max_tokens") and forced > stop.max_tokens:
        sentence = f"has {forced} ids, more than max_tokens, {stop.max_tokens}; each is a token of the output"
        yield Violation("forced_token_ids", sentence)


def _others(request: inference_pb2.GenerateRequest, most_samples: int) -> Violations:
    n = request.n if request.HasField("n") else 1
    if not 1 <= n <= most_samples:
        yield Violation("n", f"is {n}; this server gives 1 to {most_samples} samples per request")
    if request.no_repeat_ngram_size > _MOST_NGRAM:
        sentence = (
            f"is {request.no_repeat_ngram_size}; runs of at most {_MOST_NGRAM} tokens are kept from repeating"
        )
        yield Violation("no_repeat_ngram_size", sentence)
    yield from check_request_id(request.request_id)
