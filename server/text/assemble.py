"""One sequence's output as a client sees it: text, tokens and how it ended, from what the engine computed."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from server.messages import FinishReason, PositionLogprob
from server.text.detokenize import Detokenizer
from server.text.stop import StopMatcher, StopStrings

if TYPE_CHECKING:  # it brings the tokenizers library
    from server.text.decoding import Decoding


class OutputDelta(NamedTuple):
    """Text that can be passed on to the client.

    Attributes:
        text: new text.
        token_ids: new tokens, none before the whole of its text.
        logprobs: one per new token, where the engine gives them.
        finish: why the sequence ended, with its last delta.
        matched: the stop string or token that ended it, for ``FinishReason.STOP``.
        abort: the engine does not know that the sequence has ended: abort it there.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[PositionLogprob] = ()
    finish: FinishReason | None = None
    matched: str | int | None = None
    abort: bool = False


class _Pending(NamedTuple):
    token: int
    logprob: PositionLogprob | None
    end: int


class OutputAssembler:
    """Turns a sequence's tokens into deltas.

    A token that ended the sequence has no text, unless it is special and special tokens are kept. A stop
    string ends the output with the token that completes it, wherever in that token's text; tokens that the
    engine chose after it are dropped. Special tokens without text count as they are spelled, for stop strings
    that spell them.

    Args:
        tokenizer: the model's.
        stop: what ends the text.
        include_stop_string: the text includes the stop string that ended it.
        keep_special_tokens: special tokens appear in the text.
        min_tokens: a stop string that is complete before this many tokens is text like any other.

    Attributes:
        token_count: tokens of the output, those not passed on yet included.
        finish: why the output ended, or ``None``.
    """

    def __init__(
        self,
        tokenizer: Decoding,
        *,
        stop: StopStrings | None = None,
        include_stop_string: bool = False,
        keep_special_tokens: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=not keep_special_tokens)
        stop = stop or StopStrings()
        self._stops = bool(stop.given)
        self._marks = {} if keep_special_tokens else stop.marks
        self._matcher = StopMatcher(stop, include=include_stop_string)
        self._keep_special_tokens = keep_special_tokens
        self._min_tokens = min_tokens
        self._pending: deque[_Pending] = deque()
        # Characters decoded so far.
        self._decoded = 0
        self.token_count = 0
        self.finish: FinishReason | None = None

    def fork(self) -> OutputAssembler:
        """Another one that goes on from here, for an output that begins alike."""
        other = copy.copy(self)
        other._detokenizer = self._detokenizer.fork()
        other._matcher = self._matcher.fork()
        other._pending = self._pending.copy()
        return other

    def push(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[PositionLogprob] | None = None,
        finish: FinishReason | None = None,
    ) -> OutputDelta:
        """Takes one step's output of the sequence.

        Output that comes after the end, because the engine had not been told yet, changes nothing.

        Args:
            tokens: new tokens.
            logprobs: one per new token, where asked for.
            finish: why the engine ended the sequence; ``STOP`` means that the last token is a stop token.
        """
        if self.finish is not None:
            return OutputDelta()
        if len(tokens) == 1 and finish is None and not self._pending and not self._stops:
            return self._push_one(tokens, logprobs)
        text = ""
        for index, token in enumerate(tokens):
            ended = finish is FinishReason.STOP and index == len(tokens) - 1
            text += self._take(token, logprobs[index] if logprobs else None, has_text=not ended)
            if self._matcher.matched is not None:
                break
        if self._matcher.matched is None and finish is not None:
            text += self._decode_more(self._detokenizer.flush())
            text += self._matcher.flush()
        matched: str | int | None = self._matcher.matched
        if matched is not None:
            self.finish = FinishReason.STOP
        elif finish is not None:
            self.finish = finish
            matched = tokens[-1] if finish is FinishReason.STOP and tokens else None
        released = self._release()
        return OutputDelta(
            text,
            [entry.token for entry in released],
            [entry.logprob for entry in released if entry.logprob is not None],
            self.finish,
            matched,
            abort=self.finish is not None and finish is None,
        )

    def _push_one(self, tokens: Sequence[int], logprobs: Sequence[PositionLogprob] | None) -> OutputDelta:
        """The usual step in short: one more token, nothing held back, no stop strings."""
        self.token_count += 1
        text = self._detokenizer.push(tokens)
        self._decoded += len(text)
        held = self._detokenizer.held
        if not held:
            return OutputDelta(text, tokens, logprobs or ())
        self._pending.append(_Pending(tokens[0], logprobs[0] if logprobs else None, self._decoded + held))
        return OutputDelta(text)

    def _take(self, token: int, logprob: PositionLogprob | None, *, has_text: bool) -> str:
        """Adds one token and gives the text that can be passed on."""
        self.token_count += 1
        shown = has_text or (self._keep_special_tokens and token in self._tokenizer.special_token_ids)
        text = self._decode_more(self._detokenizer.push([token])) if shown else ""
        if (mark := self._marks.get(token)) is not None:
            text += self._search(mark)
        held = self._detokenizer.held
        self._pending.append(_Pending(token, logprob, self._decoded + held))
        if not held:
            self._settle()
        return text

    def _settle(self) -> None:
        """Text that was held back may have become fewer characters than it looked like."""
        for index in range(len(self._pending) - 1, -1, -1):
            if self._pending[index].end <= self._decoded:
                break
            self._pending[index] = self._pending[index]._replace(end=self._decoded)

    def _decode_more(self, text: str) -> str:
        self._decoded += len(text)
        return self._search(text)

    def _search(self, text: str) -> str:
        return self._matcher.feed(text, accept=self.token_count >= self._min_tokens)

    def _release(self) -> list[_Pending]:
        """Tokens whose text has been passed on; at the end, all."""
        passed_on = self._decoded - self._matcher.held
        released = []
        while self._pending and (self.finish is not None or self._pending[0].end <= passed_on):
            released.append(self._pending.popleft())
        return released
