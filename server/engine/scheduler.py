"""Decides which sequences compute how many tokens in the next step.

There is one rule and no phases: running sequences get some of the step's token budget to catch up with their
own tokens. Chunked prefill, prefix hits and preemption by recomputation all follow from it. Sequences that
lack one token go first; the rest is halved between the most urgent prompt and the shortest ones.
"""

from __future__ import annotations

import bisect
from collections.abc import Set
from typing import NamedTuple

from server.engine.kv_manager import KVManager
from server.engine.pace import Pace
from server.engine.page_pool import IntegrityError
from server.engine.sequence import Sequence, State
from server.messages import Submit


class Scheduled(NamedTuple):
    """A sequence that computes ``tokens`` of its tokens in this step."""

    sequence: Sequence
    tokens: int


class _Step:
    """A step's plan in the making.

    Attributes:
        preempts: sequences may have to give way to others.
        stuck: a sequence would have to give way, but must not.
        refused: waiting sequences for which there is no room.
        closed: the first in the queue is refused, and no other is admitted any more.
    """

    def __init__(self, budget: int, *, preempts: bool) -> None:
        self.budget = budget
        self.preempts = preempts
        self.stuck = self.closed = False
        self.refused: set[Sequence] = set()
        self.scheduled: dict[Sequence, int] = {}

    def plan(self, sequence: Sequence, tokens: int) -> None:
        self.scheduled[sequence] = self.scheduled.get(sequence, 0) + tokens
        self.budget -= tokens

    def drop(self, sequence: Sequence) -> None:
        self.budget += self.scheduled.pop(sequence, 0)


class Scheduler:
    """Continuous batching over a bounded number of sequences, pages and tokens per step.

    Args:
        kv: the pages.
        max_running: sequences that run at once, at most.
        max_batch_tokens: tokens of a step, at most; at least ``max_running``, so that no decode starves.
        max_prefills: prompts of more than a step that are computed at a time, at most.
        pace: how many prompt tokens a step takes; by default as many as it holds.
    """

    def __init__(
        self,
        kv: KVManager,
        max_running: int,
        max_batch_tokens: int,
        max_prefills: int = 8,
        pace: Pace | None = None,
    ) -> None:
        if max_batch_tokens < max_running:
            raise ValueError("max_batch_tokens must be at least max_running")
        self.kv = kv
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.max_prefills = max_prefills
        self.pace = pace or Pace(None)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._by_id: dict[int, Sequence] = {}
        self._arrivals = 0

    def add(self, request: Submit) -> None:
        """Queues a new sequence."""
        sequence = Sequence(request, self._arrivals)
        self._arrivals += 1
        self._by_id[request.id] = sequence
        self._enqueue(sequence)

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence, wherever it is, and frees its pages; unknown ids are ignored."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return
        (self.running if sequence.state is State.RUNNING else self.waiting).remove(sequence)
        self.kv.release(sequence)
        sequence.state = State.FINISHED

    def schedule(self) -> list[Scheduled]:
        """The sequences of the next step, with pages for all of its tokens. Empty only if nothing is queued.

        No step may be in flight: a sequence that has to give way must have no pending tokens.
        """
        step = _Step(self.max_batch_tokens, preempts=True)
        self._plan(step, self.running)
        return [Scheduled(sequence, tokens) for sequence, tokens in step.scheduled.items()]

    def schedule_ahead(self, leave_out: Set[Sequence]) -> list[Scheduled]:
        """The sequences of the step after the one in flight, whose tokens are not known yet.

        No sequence is preempted for it, for the step in flight may end a sequence and so make room.

        Args:
            leave_out: running sequences that can't go on before their tokens are known.

        Returns:
            The scheduled sequences; empty if it can't be told yet, or if there are none.
        """
        step = _Step(self.max_batch_tokens, preempts=False)
        self._plan(step, [sequence for sequence in self.running if sequence not in leave_out])
        if step.stuck:
            # An admitted sequence runs, and is part of the next step.
            return []
        return [Scheduled(sequence, tokens) for sequence, tokens in step.scheduled.items()]

    def _plan(self, step: _Step, running: list[Sequence]) -> None:
        # Decodes go first: a long prompt must not hold up any sequence's next token.
        order = sorted(running, key=lambda s: s.urgency)
        for sequence in order:
            if sequence.remaining == 1:
                self._grant(sequence, 1, step)
        step.budget = min(step.budget, self.pace.tokens or step.budget)
        prompts = [s for s in order if s.remaining > 1 and s.state is State.RUNNING]
        prompts += self._queue()
        if not prompts or not step.budget:
            return
        # The most urgent prompt gets half of the budget, so that it always goes on, and the shortest ones the
        # other half, so that they don't wait for long ones; what one half leaves the other takes.
        first = min(prompts, key=lambda s: s.urgency)
        prompts.remove(first)
        prompts.sort(key=lambda s: (-s.request.priority, s.to_compute, s.arrival))
        equals = [s for s in prompts if s.request.priority == first.request.priority]
        self._grant(first, -(-step.budget // 2), step)
        for sequence in (*equals, first, *prompts[len(equals) :]):
            if step.budget:
                self._grant(sequence, step.budget, step)

    def _queue(self) -> list[Sequence]:
        """Waiting sequences that may enter, the most urgent first."""
        if not self.waiting:
            return []
        if len(self.running) >= self.max_running:
            # Only a sequence that outranks a running one can take its place.
            lowest = min(s.request.priority for s in self.running)
            return [s for s in self.waiting if s.request.priority > lowest and not self._follows_leader(s)]
        return [sequence for sequence in self.waiting if not self._follows_leader(sequence)]

    def _grant(self, sequence: Sequence, tokens: int, step: _Step) -> None:
        """Adds up to ``tokens`` tokens of a sequence to the step, if there is room for them."""
        if step.stuck or (sequence.state is State.WAITING and not self._may_enter(sequence, step)):
            return
        planned = step.scheduled.get(sequence, 0)
        tokens = min(tokens, sequence.remaining - planned, step.budget)
        if tokens <= 0 or sequence.state is not State.RUNNING:
            return
        if self._make_room(sequence, planned + tokens, step):
            step.plan(sequence, tokens)

    def _may_enter(self, sequence: Sequence, step: _Step) -> bool:
        """Admits a waiting sequence if there is room and its turn has come.

        A sequence shorter than the first in the queue overtakes it only where there is room for both, else
        short ones could keep it out forever. At most ``max_prefills`` prompts are computed at a time, but
        for one that is shorter than what each of these still lacks.
        """
        if step.closed or sequence in step.refused:
            return False
        lacking = [n for s in self.running if (n := s.remaining - step.scheduled.get(s, 0)) > 1]
        if len(lacking) >= self.max_prefills and sequence.to_compute >= min(lacking):
            outranks = any(s.request.priority < sequence.request.priority for s in self.running)
            if not outranks:
                return False
        head = next((s for s in self.waiting if not self._follows_leader(s)), sequence)
        kept = 0 if sequence is head else self.kv.demand(head.total, self.max_batch_tokens)
        if self._admit(sequence, step, kept):
            return True
        step.refused.add(sequence)
        step.closed = sequence is head
        return False

    def restart(self, sequence: Sequence) -> None:
        """Has a running sequence recompute all its tokens, since its keys are not valid any longer."""
        self.running.remove(sequence)
        self.kv.release(sequence)
        sequence.page_keys.clear()
        self._enqueue(sequence)

    def check_integrity(self) -> None:
        """Checks the pages of all sequences against the pool, and the queues against each other.

        Raises:
            server.engine.page_pool.IntegrityError: they differ.
        """
        self.kv.check_integrity(self._by_id.values())
        queued = {s.id for s in self.running} | {s.id for s in self.waiting}
        if queued != set(self._by_id) or len(self.running) + len(self.waiting) != len(queued):
            raise IntegrityError("the queues and the index of sequences differ")
        if any(sequence.pages for sequence in self.waiting):
            raise IntegrityError("a waiting sequence holds pages")

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        sequence.found = self.kv.cached_prefix(sequence)
        bisect.insort(self.waiting, sequence, key=lambda s: s.urgency)

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        step.drop(sequence)
        self.running.remove(sequence)
        self.kv.release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self._enqueue(sequence)

    def _make_room(self, sequence: Sequence, tokens: int, step: _Step) -> bool:
        """Gets pages for a running sequence; preempts the least urgent ones if needed, itself last."""
        while not self.kv.extend(sequence, tokens):
            if not step.preempts:
                step.stuck = True
                return False
            victim = max(self.running, key=lambda s: s.urgency)
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence, step: _Step, kept: int) -> bool:
        """Moves a waiting sequence to the running ones if there is room for all pages it will hold at once.

        Pages that admitted prompts still lack are theirs, and a page for each running sequence stays in
        reserve, else the next step would preempt at once. A more urgent sequence takes the place of less
        urgent ones.

        Args:
            sequence: that waits.
            step: in the making.
            kept: pages that must stay free for others that wait.
        """
        self.kv.adopt_prefix(sequence)
        missing = self._missing(sequence)
        while not self._fits(missing + kept):
            victim = max(self.running, key=lambda s: s.urgency, default=None)
            outranked = victim is not None and victim.request.priority < sequence.request.priority
            if victim is None or not outranked or not step.preempts or self._fits(missing):
                step.stuck = step.stuck or (outranked and not step.preempts)
                self.kv.release(sequence)
                return False
            self._preempt(victim, step)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = State.RUNNING
        self.kv.count_lookup(sequence)
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
        return True

    def _fits(self, pages: int) -> bool:
        """Whether one more sequence may run and hold so many pages."""
        prompts = (s for s in self.running if s.remaining > 1)
        reserve = len(self.running) + sum(map(self._missing, prompts))
        return len(self.running) < self.max_running and pages + reserve <= self.kv.pool.available

    def _missing(self, sequence: Sequence) -> int:
        """Pages that a sequence will hold once its tokens are computed, beyond those that it has."""
        held = len(sequence.pages) - sequence.pages.count(0)
        return max(0, self.kv.demand(sequence.total, self.max_batch_tokens) - held)

    def _follows_leader(self, sequence: Sequence) -> bool:
        """Whether another sample of the prompt will compute pages that this one can take from the cache."""
        leader = self._by_id.get(sequence.request.leader) if sequence.request.leader is not None else None
        return (
            self.kv.prefix_cache
            and leader is not None
            and not sequence.wants_prompt_logprobs
            and leader.computed < leader.prompt_len
        )
