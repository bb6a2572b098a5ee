"""From a request of the wire to validated sequences for the engine."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import msgspec

from longspan.v1 import inference_pb2, types_pb2
from server.api import errors
from server.api.beams import BeamRoom, beams_of, check_beams
from server.api.checks import check, refuse
from server.api.errors import Violation
from server.api.languages import target_of
from server.api.prompt import check_tokenizer
from server.api.state import Served
from server.messages import Beams, Sampling, Submit
from server.models.target import Target
from server.ranges import RANGES
from server.text.stop import StopStrings

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
        target: of an encoder-decoder.
        forced: tokens that every sample begins with.
        beams: of a beam search.
        beam_room: for these.
    """

    request: inference_pb2.GenerateRequest
    n: int
    seed: int
    sampling: Sampling
    stop: StopStrings
    stop_token_ids: list[int]
    target: Target | None
    forced: list[int]
    beams: Beams | None
    beam_room: BeamRoom | None = None

    @property
    def width(self) -> int:
        """Sequences in the engine at once, at most."""
        return self.n if self.beams is None else self.beams.count

    def sequences(
        self, ids: list[int], prompt: list[int], context_length: int, salt: bytes = b""
    ) -> list[Submit]:
        """One sequence per sample; those after the first wait for its prompt to share its pages.

        Beams are one sequence. Generation ends where the context does, so a larger ``max_tokens`` is bounded
        and not refused.

        Raises:
            ServiceError: there is no room for so many beams.
        """
        beams, sampling = self.beams, self.sampling
        if beams is not None:
            beams, ids = msgspec.structs.replace(beams, others=ids[1:]), ids[:1]
            sampling = msgspec.structs.replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
        stop, logprobs, target = self.request.stop, self.request.logprobs, self.target
        max_tokens = self._max_tokens(len(prompt), context_length)
        min_tokens = _min_tokens(self.request, target)
        seeds = [(self.seed + index * _SEED_STEP) % 2**64 for index in range(self.n)]
        return [
            Submit(
                id=id_,
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=seeds[index]),
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                stop_token_ids=self.stop_token_ids,
                logprobs=logprobs.output if logprobs.HasField("output") else None,
                prompt_logprobs=logprobs.prompt if logprobs.HasField("prompt") and index == 0 else None,
                priority=self.request.priority,
                leader=ids[0] if index else None,
                forced=self.forced[:max_tokens],
                salt=salt,
                start=[] if target is None else target.start,
                forced_end=None if target is None or stop.ignore_eos else target.forced_end,
                beams=beams,
            )
            for index, id_ in enumerate(ids)
        ]

    def kv_tokens(self, prompt: int, context_length: int, *, shared: bool) -> int:
        """Tokens of the KV cache that the request can come to take, where no page is evicted.

        Args:
            prompt: tokens of the prompt.
            context_length: most tokens of prompt and output together.
            shared: whether samples share the prompt's pages.

        Raises:
            ServiceError: there is no room for so many beams.
        """
        return prompt * (1 if shared else self.width) + self.width * self._max_tokens(prompt, context_length)

    def _max_tokens(self, prompt: int, context_length: int) -> int:
        stop, room = self.request.stop, context_length - prompt
        usual = room
        if self.target is not None:
            room = self.target.info.target_length - len(self.target.start)
            usual = min(self.target.max_tokens or room, room)
        asked = stop.HasField("max_tokens")
        tokens = min(stop.max_tokens, room) if asked else usual
        if self.beams is None or self.beam_room is None:
            return tokens
        size, start = self.beam_room.page_size, [] if self.target is None else self.target.start
        begun = -(-prompt // size) * size + len(start) if start else prompt
        enough = self.beam_room.tokens(self.beams.count, begun, tokens)
        if enough < (tokens if asked else 1):
            sentence = (
                f"is {self.beams.count}; the KV cache has room for {max(0, enough)} output tokens of each; "
                "lower num_beams or stop.max_tokens, shorten the prompt, or have --kv-memory raised"
            )
            raise errors.invalid([Violation("beam_search.num_beams", sentence)])
        return enough


def plan(request: inference_pb2.GenerateRequest, served: Served, limit: inference_pb2.Limits) -> Plan:
    """Checks every field.

    Raises:
        ServiceError: INVALID_ARGUMENT with all fields at fault; FAILED_PRECONDITION for a chat where the
            model has no template, and for text where it has no tokenizer.
    """
    vocabulary = served.ready.vocabulary_size
    check(request, vocabulary, limit, served.longest_prompt)
    target, first = target_of(request, served)
    forced = [*first, *request.forced_token_ids]
    if request.WhichOneof("prompt") != "token_ids" or request.stop.stop_strings:
        check_tokenizer(served)
    if request.HasField("chat") and not served.tokenizer.has_chat_template:
        raise errors.no_chat_template(served.name, served.tokenizer.chat_refusal)
    stop = StopStrings(request.stop.stop_strings, served.tokenizer.special_tokens)
    stop_ids = {*request.stop.stop_token_ids, *(id_ for id_ in stop.token_ids if id_ < vocabulary)}
    if not request.stop.ignore_eos:
        stop_ids.update(served.generation.eos_token_ids)
    banned = () if target is None else target.banned
    if _min_tokens(request, target) and len(stop_ids.union(banned)) >= vocabulary:
        sentence = "leave no token to choose before min_tokens; name fewer, or set min_tokens to 0"
        raise errors.invalid([Violation("stop.stop_token_ids", sentence)])
    sampling = _sampling(request, served.generation.sampling, target)
    refuse(check_beams(request, served.ready.max_running))
    seeded = request.sampling.HasField("seed")
    return Plan(
        request=request,
        n=request.n if request.HasField("n") else 1,
        seed=request.sampling.seed if seeded else secrets.randbits(64),
        sampling=sampling,
        stop=stop,
        stop_token_ids=sorted(stop_ids),
        target=target,
        forced=forced,
        beams=beams_of(request),
        beam_room=BeamRoom.of(served.ready),
    )


def _min_tokens(request: inference_pb2.GenerateRequest, target: Target | None) -> int:
    """Tokens before which a sample does not end, by the request or else by the makers of its model."""
    if request.stop.HasField("min_tokens"):
        return request.stop.min_tokens
    return 0 if target is None else target.min_tokens


_SAMPLING_FIELDS = (*RANGES, "top_k")


def sampling_params(sampling: Sampling) -> types_pb2.SamplingParams:
    """The values of fields that a request may leave unset."""
    return types_pb2.SamplingParams(**{name: getattr(sampling, name) for name in _SAMPLING_FIELDS})


def _sampling(request: inference_pb2.GenerateRequest, default: Sampling, target: Target | None) -> Sampling:
    sampling = request.sampling
    given = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS if sampling.HasField(name)}
    bias, ngram = dict(sampling.logit_bias), request.no_repeat_ngram_size
    if target is not None:
        bias |= dict.fromkeys(target.banned, -math.inf)
        ngram = ngram if request.HasField("no_repeat_ngram_size") else target.no_repeat_ngram
    return msgspec.structs.replace(default, **given, logit_bias=bias, no_repeat_ngram=ngram)
