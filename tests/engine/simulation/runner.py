"""A runner without a model, whose cache holds for each token a value that depends on all tokens before it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from attention.reading import Pages
from server.engine.kv_manager import Expired
from server.engine.runner import Launched, Runner, RunOutput
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.messages import Logprob, PositionLogprob
from server.models.executors.base import GivenUpError
from tests.engine.simulation.oracle import Answer, answer, content, following, raises, sampled

_LATE = 0.02
_GIVEN_UP = 0.5
_GARBAGE = -1
_ECHOED = PositionLogprob(Logprob(0, 0.0, 1), [])


class Clock:
    """Pretended seconds; stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Rule:
    """What a query sees: all tokens, or sinks and a window of the last ones."""

    def __init__(self, window: int | None, sinks: int = 0) -> None:
        self.window, self.sinks = window, sinks

    def expired(self, seq_len: int, page_size: int) -> range:
        if self.window is None:
            return range(0)
        first = -(-self.sinks // page_size)
        return range(first, max(first, (seq_len - self.window + 1) // page_size))

    def visible(self, position: int) -> list[range]:
        """Positions that the query at this one sees."""
        if self.window is None or position < self.window + self.sinks:
            return [range(position + 1)]
        return [range(self.sinks), range(position - self.window + 1, position + 1)]


class _NoModel(nn.Module):
    config = SimpleNamespace(get_text_config=lambda decoder: None)

    def get_output_embeddings(self) -> None:
        """It has none."""


class FakeRunner:
    """Stands in for ``Runner``: writes what a model would write, and checks what it would read.

    Args:
        pages: of the cache.
        page_size: tokens per page.
        rule: of attention.
        context_length: most tokens of a sequence.
        clock: goes on with each step.
        rng: draws durations, and which tokens a step launched ahead can't take from the one before.
    """

    rope = None
    nan_advice = ""
    device = torch.device("cpu")

    def __init__(
        self,
        pages: int,
        page_size: int,
        rule: Rule,
        context_length: int,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        expired: Expired = rule.expired
        self.attention = SimpleNamespace(expired=expired, pattern=rule, layers=[])
        self.cache = SimpleNamespace(pages=pages, page_size=page_size, layers={})
        self.executor = SimpleNamespace(model=_NoModel(), gives_up=True)
        self.given_up = self.raised = 0
        self._rule, self._context, self._clock, self._rng = rule, context_length, clock, rng
        self._cells = [[_GARBAGE] * page_size for _ in range(pages)]
        self._answers: dict[int, Answer] = {}

    def launch(
        self, scheduled: list[Scheduled], before: Launched | None = None, watched: int | None = None
    ) -> Any:
        assert scheduled
        if watched is not None and self._rng.random() < _GIVEN_UP:
            self._give_up(scheduled)
        unknown = set()
        for sequence, count in scheduled:
            assert count > 0
            end = sequence.computed + count
            assert end <= sequence.expected, "tokens are computed that do not exist"
            assert sequence.total >= end - 1
            if end > sequence.total:
                assert before is not None, "a token is computed before it is known"
                row = before.sequences.index(sequence)
                if before.sampled[row] is None:
                    unknown.add(sequence)
            self._write(sequence, end, last_is_known=sequence not in unknown)
        for sequence, count in scheduled:
            self._read(sequence, count, sequence in unknown)
        caught_up = [s for s, count in scheduled if count == s.remaining and s.group is None]
        searches = {s.group: 0 for s, count in scheduled if count == s.remaining and s.group is not None}
        for group in searches:
            assert all((part, 1) in scheduled or part is group for part in group.parts), "beams are parted"
        positions = [(s.request, s.output_len + s.pending) for s in caught_up]
        positions += [(group.request, len(group.search.running[0].tokens)) for group in searches]
        if any(raises(*one) for one in positions):
            self.raised += 1
            raise RuntimeError("a pretended fault")
        ahead = [self._ahead(sequence) for sequence in caught_up]
        echo = [len(Runner._echo_positions(one)) for one in scheduled]
        tokens = sum(count for _, count in scheduled)
        self._clock.now += 0.002 + tokens * 0.0005 * self._rng.uniform(0.5, 2)
        return Launched(caught_up, ahead, searches, echo, len(caught_up), Pages(0, 0, ()))

    def collect(self, launched: Any, void: Any = frozenset()) -> RunOutput:
        tokens: list[int | None] = []
        late = []
        for sequence, taken in zip(launched.sequences, launched.sampled, strict=True):
            tokens.append(sampled(sequence.request, sequence.output_len))
            if taken is None and tokens[-1] is not None and sequence not in void:
                late.append(sequence)
        echoed = [[_ECHOED] * count for count in launched.echo]
        searches = {group: following(group.search, group.request) for group in launched.searches}
        return RunOutput([[token] for token in tokens], [[] for _ in tokens], late, searches, echoed)

    def copy(self, copies: Mapping[int, int]) -> None:
        for to, origin in copies.items():
            self._cells[to] = list(self._cells[origin])

    def forget(self, sequence_id: int) -> None:
        """Drops what is kept of a sequence that has ended."""
        self._answers.pop(sequence_id, None)

    def content(self, sequence: Sequence) -> list[int]:
        request = sequence.request
        if sequence.group is not None:
            return content(sequence.tokens)
        found = self._answers.get(request.id)
        if found is None:
            found = self._answers[request.id] = answer(request, self._context)
        return found.content

    def check(self, pages: Mapping[bytes, int], prompts: Mapping[bytes, list[int]]) -> None:
        """Pages that can be found hold what their prompts say."""
        for key, page in pages.items():
            assert self._cells[page] == content(prompts[key])[-self.cache.page_size :], "a page has changed"

    def _give_up(self, scheduled: list[Scheduled]) -> None:
        """Leaves of a step what some layers may have written."""
        for sequence, count in scheduled:
            for position in range(sequence.computed, sequence.computed + count):
                page = sequence.pages[position // self.cache.page_size]
                self._cells[page][position % self.cache.page_size] = _GARBAGE
        self.given_up += 1
        raise GivenUpError

    def _ahead(self, sequence: Sequence) -> int | None:
        """The token as a step launched ahead finds it; ``None`` if it finds none."""
        position = sequence.output_len + sequence.pending
        return None if self._rng.random() < _LATE else sampled(sequence.request, position)

    def _write(self, sequence: Sequence, end: int, *, last_is_known: bool) -> None:
        content, size, pages = self.content(sequence), self.cache.page_size, sequence.pages
        for position in range(sequence.computed, end):
            page = pages[position // size]
            assert page, f"sequence {sequence.id} has no page for token {position}"
            # Beyond the answer only a step launched ahead computes, for nothing.
            known = position < len(content) and (last_is_known or position < end - 1)
            self._cells[page][position % size] = content[position] if known else _GARBAGE

    def _read(self, sequence: Sequence, count: int, unknown: bool) -> None:
        """Checks all that the first and the last query of a chunk see."""
        content, size = self.content(sequence), self.cache.page_size
        last = sequence.computed + count - 1
        for query in {sequence.computed, last}:
            if query >= len(content) or (unknown and query == last):
                continue
            for seen in self._rule.visible(query):
                for index in range(seen.start // size, -(-seen.stop // size)):
                    begin, end = max(seen.start, index * size), min(seen.stop, (index + 1) * size)
                    cells = self._cells[sequence.pages[index]]
                    assert cells[begin - index * size : end - index * size] == content[begin:end], (
                        f"sequence {sequence.id} reads other tokens than its own before token {query}"
                    )
