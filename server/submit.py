"""The message by which a sequence comes to the engine, and its parts; see ``server.messages``."""

from __future__ import annotations

from typing import Literal

import msgspec

EarlyStopping = Literal["heuristic", "full", "never"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How one sequence's tokens are sampled; validated before it gets here. See ``types.proto``.

    A bias may be minus infinity here, of a token that is never to be sampled.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    no_repeat_ngram: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without randomness."""
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class StopTexts(msgspec.Struct, frozen=True, array_like=True):
    """Stop strings of a beam search, which the engine itself looks for; see ``OutputAssembler``.

    Attributes:
        strings: none of them empty.
        keep_special_tokens: special tokens are text.
        min_tokens: one that is complete before so many output tokens is text like any other.
    """

    strings: list[str]
    keep_special_tokens: bool
    min_tokens: int


class Beams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How to search for the likeliest outputs.

    Attributes:
        count: beams that go on from each step.
        length_penalty: a finished beam's score is divided by its length to this power.
        early_stopping: ``full``: it ends with ``count`` finished beams. ``heuristic``: when the best beam
            that goes on, at its length, does not better the worst of these; ``never``: at any length, where
            ``length_penalty`` is positive.
        others: ids under which the second best output and so on are told, fewer than ``count``.
        stop: texts that end a beam.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "heuristic"
    others: list[int] = []
    stop: StopTexts | None = None


class Submit(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="submit"):
    """A new sequence. ``n`` samples of a request are ``n`` sequences with different seeds.

    Attributes:
        id: unique among the sequences in flight, drawn by the server process.
        prompt: token ids, at least one, fewer than the context length.
        max_tokens: at least 1; prompt and output fit the context together.
        min_tokens: no stop token is sampled before this many output tokens.
        stop_token_ids: the tokens that end the sequence, end-of-sequence tokens included unless ignored.
        logprobs: ``None`` for none, else how many of the most likely tokens beside the sampled one.
        prompt_logprobs: the same for the prompt's tokens after the first.
        priority: higher goes first.
        forced: the output's first tokens, at most ``max_tokens``; none of them ends the sequence.
        leader: id of an earlier sequence with the same prompt, the request's first sample; wait until its
            prompt is computed, to share its pages. ``None`` for none.
        salt: begins the keys of its pages in the prefix cache; only sequences of the same salt share pages.
        start: tokens that an encoder-decoder's decoder begins with, whose source the prompt is; empty for a
            decoder.
        source: of a sequence that is laid out (``server.engine.source``), tokens of its source.
        forced_end: the token that is output as the last of ``max_tokens``, if no other ends the sequence
            before.
        beams: of a beam search, whose sampling is greedy; ``None`` for one output.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    leader: int | None = None
    forced: list[int] = []
    salt: bytes = b""
    start: list[int] = []
    source: int = 0
    forced_end: int | None = None
    beams: Beams | None = None

    @property
    def ids(self) -> list[int]:
        """The ids of its outputs."""
        return [self.id, *(() if self.beams is None else self.beams.others)]
