"""Decides which sequences compute how many tokens in the next step.

There is one rule and no phases: every running sequence gets some of the step's token budget to catch up with
its own tokens. Chunked prefill, prefix hits and preemption by recomputation all follow from it.
"""

from __future__ import annotations

import bisect
from collections.abc import Set
from typing import NamedTuple

from server.engine.kv_manager import KVManager
from server.engine.page_pool import IntegrityError
from server.engine.sequence import Sequence, State
from server.messages import Submit


class Work(NamedTuple):
    """``tokens`` of ``sequence`` are to be computed in this step."""

    sequence: Sequence
    tokens: int


class _Step:
    """A step's plan in the making.

    Attributes:
        preempts: sequences may have to give way to others.
        stuck: somebody would have had to, but must not.
    """

    def __init__(self, budget: int, *, preempts: bool) -> None:
        self.budget = budget
        self.preempts = preempts
        self.stuck = False
        self.work: dict[Sequence, int] = {}

    def plan(self, sequence: Sequence, tokens: int) -> None:
        self.work[sequence] = tokens
        self.budget -= tokens

    def drop(self, sequence: Sequence) -> None:
        self.budget += self.work.pop(sequence, 0)


class Scheduler:
    """Continuous batching over a bounded number of sequences, pages and tokens per step.

    Args:
        kv: the pages.
        max_running: sequences that run at once, at most.
        max_batch_tokens: tokens of a step, at most; at least ``max_running``, so that no decode starves.
    """

    def __init__(self, kv: KVManager, max_running: int, max_batch_tokens: int) -> None:
        if max_batch_tokens < max_running:
            raise ValueError("max_batch_tokens must be at least max_running")
        self.kv = kv
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
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

    def schedule(self) -> list[Work]:
        """The next step's work, with pages allocated for all of it. Empty only if nothing is queued.

        No step may be in flight: a sequence that has to give way must have no pending tokens.
        """
        step = _Step(self.max_batch_tokens, preempts=True)
        self._plan(step, self.running)
        return [Work(sequence, tokens) for sequence, tokens in step.work.items()]

    def schedule_ahead(self, leave_out: Set[Sequence]) -> list[Work]:
        """The work of the step after the one in flight, whose tokens are not known yet.

        Nobody is preempted for it, for the step in flight may end a sequence and so make room.

        Args:
            leave_out: running sequences that can't go on before their tokens are known.

        Returns:
            The work; empty if it can't be told yet, or if there is none.
        """
        step = _Step(self.max_batch_tokens, preempts=False)
        self._plan(step, [sequence for sequence in self.running if sequence not in leave_out])
        if step.stuck:
            # Who was admitted runs, and is part of the next step.
            return []
        return [Work(sequence, tokens) for sequence, tokens in step.work.items()]

    def _plan(self, step: _Step, running: list[Sequence]) -> None:
        # Who lacks a single token goes first: a long prompt must not hold up anybody's next token.
        for sequence in sorted(running, key=lambda s: (s.remaining > 1, s.urgency)):
            tokens = min(sequence.remaining, step.budget)
            if tokens and sequence.state is State.RUNNING and self._make_room(sequence, tokens, step):
                step.plan(sequence, tokens)
        if step.stuck:
            return
        for sequence in list(self.waiting):
            if self._follows_leader(sequence):
                continue
            if step.budget == 0 or not self._admit(sequence, step):
                break
            tokens = min(sequence.remaining, step.budget)
            if not self.kv.extend(sequence, tokens):
                raise RuntimeError("a sequence was admitted without room for it")
            step.plan(sequence, tokens)

    def restart(self, sequence: Sequence) -> None:
        """Has a running sequence compute all its tokens again, since its keys don't fit it any longer."""
        self.running.remove(sequence)
        self.kv.release(sequence)
        sequence.page_keys.clear()
        self._enqueue(sequence)

    def check_integrity(self) -> None:
        """Checks the pages of all sequences against the pool, and the queues against each other.

        Raises:
            server.engine.page_pool.IntegrityError: the books differ.
        """
        self.kv.check_integrity(self._by_id.values())
        queued = {s.id for s in self.running} | {s.id for s in self.waiting}
        if queued != set(self._by_id) or len(self.running) + len(self.waiting) != len(queued):
            raise IntegrityError("the queues and the index of sequences differ")
        if any(sequence.pages for sequence in self.waiting):
            raise IntegrityError("a waiting sequence holds pages")

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        bisect.insort(self.waiting, sequence, key=lambda s: s.urgency)

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        step.drop(sequence)
        self.running.remove(sequence)
        self.kv.release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self._enqueue(sequence)

    def _make_room(self, sequence: Sequence, tokens: int, step: _Step) -> bool:
        """Gets pages for a running sequence, from the least urgent ones if need be, itself at the last."""
        while not self.kv.extend(sequence, tokens):
            if not step.preempts:
                step.stuck = True
                return False
            victim = max(self.running, key=lambda s: s.urgency)
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Moves a waiting sequence to the running ones if there is room for all pages it will hold at once.

        A page for each running sequence stays in reserve, else the next step would preempt at once. A more
        urgent sequence takes the place of less urgent ones.
        """
        self.kv.adopt_prefix(sequence)
        while True:
            reserve = len(self.running)
            held = len(sequence.pages) - sequence.pages.count(0)
            missing = self.kv.demand(sequence.total, self.max_batch_tokens) - held
            if len(self.running) < self.max_running and missing + reserve <= self.kv.pool.available:
                break
            victim = max(self.running, key=lambda s: s.urgency, default=None)
            outranked = victim is not None and victim.request.priority < sequence.request.priority
            if victim is None or not outranked or not step.preempts:
                step.stuck = step.stuck or outranked
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

    def _follows_leader(self, sequence: Sequence) -> bool:
        """Another sample of the same prompt is about to compute what this one could take from the cache."""
        leader = self._by_id.get(sequence.request.leader) if sequence.request.leader is not None else None
        return (
            self.kv.prefix_cache
            and leader is not None
            and not sequence.wants_prompt_logprobs
            and leader.computed < leader.prompt_len
        )
