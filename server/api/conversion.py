"""From a request of the wire to validated sequences for the engine."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from longspan.v1 import inference_pb2, types_pb2
from server.api import errors
from server.api.errors import Violation, quote
from server.api.prompt import check_tokenizer
from server.api.state import Served
from server.messages import Ready, Sampling, Submit
from server.ranges import RANGES
from server.settings import Settings
from server.text.stop import StopStrings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

# Seeds of a request's samples lie this far apart (an odd number near 2**64 / golden ratio, as in SplitMix64).
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Plan:
    """A request whose fields are all valid; its prompt is not tokenized yet.

    Attributes:
        request: as it came.
        n: samples.
        seed: of sample 0, given or drawn.
        sampling: of all samples, but for the seed.
        stop: its stop strings.
        stop_token_ids: what ends a sample, end-of-sequence tokens included unless ignored.
    """

    request: inference_pb2.GenerateRequest
    n: int
    seed: int
    sampling: Sampling
    stop: StopStrings
    stop_token_ids: list[int]

    def sequences(self, ids: list[int], prompt: list[int], context_length: int) -> list[Submit]:
        """One sequence per sample; those after the first wait for its prompt to share its pages.

        Generation ends where the context does, so a larger ``max_tokens`` is bounded and not refused.
        """
        stop, logprobs = self.request.stop, self.request.logprobs
        room = context_length - len(prompt)
        max_tokens = min(stop.max_tokens, room) if stop.HasField("max_tokens") else room
        seeds = [(self.seed + index * _SEED_STEP) % 2**64 for index in range(self.n)]
        return [
            Submit(
                id=id_,
                prompt=prompt,
                sampling=msgspec.structs.replace(self.sampling, seed=seeds[index]),
                max_tokens=max_tokens,
                min_tokens=min(stop.min_tokens, max_tokens),
                stop_token_ids=self.stop_token_ids,
                logprobs=logprobs.output if logprobs.HasField("output") else None,
                prompt_logprobs=logprobs.prompt if logprobs.HasField("prompt") and index == 0 else None,
                priority=self.request.priority,
                leader=ids[0] if index else None,
                forced=list(self.request.forced_token_ids),
            )
            for index, id_ in enumerate(ids)
        ]


def limits(settings: Settings, ready: Ready) -> inference_pb2.Limits:
    """The most that requests may ask for: no more samples than the server ever admits."""
    return inference_pb2.Limits(
        max_tokens=ready.context_length - 1,
        n=min(settings.max_n, ready.max_running + settings.max_queue),
        logprobs=settings.max_logprobs,
        stop_strings=settings.max_stop_strings,
    )


def valid_request_id(request_id: str) -> bool:
    """Whether a request may be called that: up to 128 characters that are safe in headers and logs."""
    return _REQUEST_ID.fullmatch(request_id) is not None


def plan(request: inference_pb2.GenerateRequest, served: Served, settings: Settings) -> Plan:
    """Checks every field.

    Raises:
        ServiceError: INVALID_ARGUMENT with all fields at fault; FAILED_PRECONDITION for a chat where the
            model has no template, and for text where it has no tokenizer.
    """
    limit = limits(settings, served.ready)
    vocabulary = served.ready.vocabulary_size
    n = request.n if request.HasField("n") else 1
    found = [
        *_check_prompt(request, vocabulary),
        *_check_sampling(request.sampling, vocabulary),
        *_check_stop(request.stop, vocabulary, limit.stop_strings),
        *_check_logprobs(request.logprobs, limit.logprobs),
        *_check_forced(request, vocabulary),
    ]
    if not 1 <= n <= limit.n:
        found.append(Violation("n", f"is {n}; this server gives 1 to {limit.n} samples per request"))
    if request.request_id and not valid_request_id(request.request_id):
        allowed = "1 to 128 letters, digits and . _ : / + = @ -"
        found.append(Violation("request_id", f"is {quote(request.request_id)}; it may have {allowed}"))
    if found:
        raise errors.invalid(found)
    if request.WhichOneof("prompt") != "token_ids" or request.stop.stop_strings:
        check_tokenizer(served)
    if request.HasField("chat") and not served.tokenizer.has_chat_template:
        raise errors.no_chat_template(served.name, served.tokenizer.chat_refusal)
    stop = StopStrings(request.stop.stop_strings, served.tokenizer.special_tokens)
    stop_ids = {*request.stop.stop_token_ids, *(id_ for id_ in stop.token_ids if id_ < vocabulary)}
    if not request.stop.ignore_eos:
        stop_ids.update(served.generation.eos_token_ids)
    if request.stop.min_tokens and len(stop_ids) >= vocabulary:
        sentence = "leave no token to choose before min_tokens; name fewer"
        raise errors.invalid([Violation("stop.stop_token_ids", sentence)])
    seeded = request.sampling.HasField("seed")
    return Plan(
        request=request,
        n=n,
        seed=request.sampling.seed if seeded else secrets.randbits(64),
        sampling=_sampling(request.sampling, served.generation.sampling),
        stop=stop,
        stop_token_ids=sorted(stop_ids),
    )


def check_chat(chat: types_pb2.Chat) -> list[Violation]:
    """What is wrong with a conversation, whatever the template."""
    if not chat.messages:
        return [Violation("chat.messages", "is empty; send at least one message")]
    return [
        Violation(f"chat.messages[{index}].role", "is empty; name who speaks, such as user")
        for index, message in enumerate(chat.messages)
        if not message.role
    ]


def check_token_ids(field: str, ids: Iterable[int], vocabulary: int) -> list[Violation]:
    """Ids that the model doesn't have."""
    return [
        Violation(f"{field}[{index}]", f"is {id_}; the model's token ids go from 0 to {vocabulary - 1}")
        for index, id_ in enumerate(ids)
        if id_ >= vocabulary
    ]


def _check_prompt(request: inference_pb2.GenerateRequest, vocabulary: int) -> list[Violation]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        return [Violation("prompt", "is not set; send text, token_ids or chat")]
    if kind == "chat":
        return check_chat(request.chat)
    if kind == "text":
        return [] if request.text else [Violation("text", "is empty; send at least one character")]
    if not request.token_ids.ids:
        return [Violation("token_ids.ids", "is empty; send at least one token id")]
    if request.special_tokens_as_text:
        return [Violation("special_tokens_as_text", "is for text and chat; token ids are taken as they are")]
    return check_token_ids("token_ids.ids", request.token_ids.ids, vocabulary)


_SAMPLING_FIELDS = (*RANGES, "top_k")
_MOST_BIAS = 100.0
# Each is looked at for every token.
_MOST_STOP_TOKENS = 256


def _check_sampling(sampling: types_pb2.SamplingParams, vocabulary: int) -> list[Violation]:
    found = []
    for name, (words, inside) in RANGES.items():
        value = getattr(sampling, name)
        if sampling.HasField(name) and not (math.isfinite(value) and inside(value)):
            found.append(Violation(f"sampling.{name}", f"is {value:g}; it must be a number {words}"))
    for token, bias in sorted(sampling.logit_bias.items()):
        field = f"sampling.logit_bias[{token}]"
        if token >= vocabulary:
            found.append(
                Violation(field, f"names token {token}; the model's token ids go from 0 to {vocabulary - 1}")
            )
        if not abs(bias) <= _MOST_BIAS:  # the comparison is false for NaN
            found.append(Violation(field, f"is {bias:g}; it must be a number from -100 to 100"))
    return found


def _check_stop(stop: types_pb2.StopConditions, vocabulary: int, most_strings: int) -> list[Violation]:
    found = check_token_ids("stop.stop_token_ids", stop.stop_token_ids, vocabulary)
    if len(stop.stop_token_ids) > _MOST_STOP_TOKENS:
        ids = len(stop.stop_token_ids)
        found.append(
            Violation("stop.stop_token_ids", f"has {ids} ids; at most {_MOST_STOP_TOKENS} are taken")
        )
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        found.append(Violation("stop.max_tokens", "is 0; ask for at least 1 token"))
    elif stop.HasField("max_tokens") and stop.min_tokens > stop.max_tokens:
        found.append(
            Violation("stop.min_tokens", f"is {stop.min_tokens}, more than max_tokens, {stop.max_tokens}")
        )
    if len(stop.stop_strings) > most_strings:
        found.append(
            Violation(
                "stop.stop_strings",
                f"has {len(stop.stop_strings)} strings; this server takes {most_strings} at most",
            )
        )
    found.extend(
        Violation(f"stop.stop_strings[{index}]", "is empty; every output would match it, so leave it out")
        for index, text in enumerate(stop.stop_strings)
        if not text
    )
    return found


def _check_logprobs(logprobs: types_pb2.LogprobParams, most: int) -> list[Violation]:
    return [
        Violation(f"logprobs.{name}", f"is {getattr(logprobs, name)}; this server gives {most} at most")
        for name in ("output", "prompt")
        if logprobs.HasField(name) and getattr(logprobs, name) > most
    ]


def _check_forced(request: inference_pb2.GenerateRequest, vocabulary: int) -> list[Violation]:
    found = check_token_ids("forced_token_ids", request.forced_token_ids, vocabulary)
    forced, stop = len(request.forced_token_ids), request.stop
    if stop.HasField("max_tokens") and forced > stop.max_tokens:
        sentence = f"has {forced} ids, more than max_tokens, {stop.max_tokens}; each is a token of the output"
        found.append(Violation("forced_token_ids", sentence))
    return found


def sampling_params(sampling: Sampling) -> types_pb2.SamplingParams:
    """The values of fields that a request may leave unset."""
    return types_pb2.SamplingParams(**{name: getattr(sampling, name) for name in _SAMPLING_FIELDS})


def _sampling(sampling: types_pb2.SamplingParams, default: Sampling) -> Sampling:
    given = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS if sampling.HasField(name)}
    return msgspec.structs.replace(default, **given, logit_bias=dict(sampling.logit_bias))
