"""Decides which sequences compute how many tokens in the next step.

There is one rule and no phases: running sequences get some of the step's token budget to catch up with their
own tokens. Chunked prefill, prefix hits and preemption by recomputation all follow from it. Sequences that
lack one token go first; ``division`` says how prompts share the rest. Tokens that are then left go to
drafts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Set
from functools import partial
from typing import NamedTuple

from server.engine.beam_group import BeamGroup
from server.engine.division import Division, Step
from server.engine.kv_manager import KVManager
from server.engine.pace import MULTIPLE, Pace
from server.engine.page_pool import IntegrityError
from server.engine.room import NOTHING, Need, Room
from server.engine.sequence import Sequence, State
from server.engine.sharing import Sharing
from server.engine.waiting import Waiting
from server.messages import Submit
from server.text.assemble import OutputAssembler

QUIET = 1.0
"""Seconds without another request after which none is expected soon."""


class Scheduled(NamedTuple):
    """A sequence that computes ``tokens`` of its tokens in this step."""

    sequence: Sequence
    tokens: int


class Scheduler:
    """Continuous batching over a bounded number of sequences, pages and tokens per step.

    Args:
        kv: the pages.
        max_running: sequences that run at once, at most.
        max_batch_tokens: tokens of a step, at most; at least ``max_running``, so that no decode starves.
        max_prefills: prompts of more than a step that are computed at a time, at most.
        pace: how much of prompts a step computes; by default as much as it holds.
        aging: seconds of waiting that raise a priority by one; ``None`` if waiting raises none.
        gives_up: a step can be given up when another request comes.
        clock: monotonic seconds.

    Attributes:
        given_up: the step scheduled last is to be given up then: it is a long prompt's that held up nothing.
    """

    def __init__(
        self,
        kv: KVManager,
        max_running: int,
        max_batch_tokens: int,
        max_prefills: int = 8,
        pace: Pace | None = None,
        aging: float | None = None,
        gives_up: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batch_tokens < max_running:
            raise ValueError("max_batch_tokens must be at least max_running")
        self.kv = kv
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.max_prefills = max_prefills
        self.pace = pace or Pace(None)
        self._aging = aging
        self._gives_up = gives_up
        self.given_up = False
        self._clock = clock
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self._room = Room(kv, self.running, max_running, max_batch_tokens)
        self.preemptions = 0
        self._by_id: dict[int, Sequence] = {}
        self._sharing = Sharing(kv, self.running, self._by_id)
        self._arrivals = 0
        self._came = self._came_before = -math.inf

    def add(self, request: Submit, text: OutputAssembler | None = None) -> None:
        """Queues a new sequence; ``text`` is of its beams, where stop strings may end them."""
        # All grow more urgent at the same rate, so that their order is that of their arrivals, each taken as
        # earlier by its priority's worth of waiting.
        self._came, self._came_before = self._clock(), self._came
        waited = 0.0 if self._aging is None else self._came / self._aging
        rank = waited - request.priority
        plain = request.beams is None
        sequence = (Sequence if plain else partial(BeamGroup, text=text))(request, self._arrivals, rank)
        self._arrivals += 1
        self._by_id[request.id] = sequence
        self._enqueue(sequence)

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence, wherever it is, and frees its pages; unknown ids are ignored."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        for part in sequence.parts:
            self.kv.release(part)
            part.state = State.FINISHED
        sequence.state = State.FINISHED
        self._enqueue_followers(sequence)

    def schedule(self) -> list[Scheduled]:
        """The sequences of the next step, with pages for all of its tokens. Empty only if nothing is queued.

        No step may be in flight: a sequence that has to give way must have no pending tokens.
        """
        step = Step(self.max_batch_tokens, preempts=True)
        self._plan(step, self.running)
        step.add_drafts(self.kv.extend)
        return self._listed(step)

    def schedule_ahead(self, leave_out: Set[Sequence]) -> list[Scheduled]:
        """The sequences of the step after the one in flight, whose tokens are not known yet.

        No sequence is preempted for it, for the step in flight may end a sequence and so make room.

        Args:
            leave_out: running sequences that can't go on before their tokens are known.

        Returns:
            The scheduled sequences; empty if it can't be told yet, or if there are none.
        """
        step = Step(self.max_batch_tokens, preempts=False)
        self._plan(step, [sequence for sequence in self.running if sequence not in leave_out])
        if step.stuck:
            # An admitted sequence runs, and is part of the next step.
            return []
        return self._listed(step)

    @staticmethod
    def _listed(step: Step) -> list[Scheduled]:
        """The sequences of a step, beams last."""
        scheduled = [Scheduled(sequence, tokens) for sequence, tokens in step.scheduled.items()]
        return sorted(scheduled, key=lambda one: one.sequence.group is not None)

    def _plan(self, step: Step, running: list[Sequence]) -> None:
        self.given_up = False
        for sequence in self.running:
            if sequence.computed >= sequence.prompt_len:
                self._enqueue_followers(sequence)
            if isinstance(sequence, BeamGroup):
                sequence.fork(self.kv)
        # Decodes go first: a long prompt must not hold up any sequence's next token.
        order = sorted(running, key=lambda s: s.urgency)
        for sequence in order:
            if sequence.decodes:
                self._decode(sequence, step)
        prompts = [part for s in order for part in s.parts if part.remaining > 1 and s.state is State.RUNNING]
        prompts += self._candidates()
        if not prompts or not step.budget:
            return
        # A prompt's own arrival says nothing of others'.
        newest = prompts[0].arrival == self._arrivals - 1
        quiet = self._clock() - (self._came_before if newest else self._came) >= QUIET
        division = Division(prompts, self.pace, step, quiet=quiet, gives_up=self._gives_up)
        self.given_up = step.given_up
        for sequence, cost in division.shares():
            if step.budget and step.allowance > 0:
                self._grant(sequence, cost, step)

    def _candidates(self) -> list[Sequence]:
        """Waiting sequences that may enter: the most urgent, and as many of the shortest as run at once."""
        first = self.waiting.first
        if first is None:
            return []
        full = self._room.full
        lowest = min(s.request.priority for s in self.running) if full else -math.inf
        shortest = self.waiting.shortest(self.max_running, lowest)
        candidates = [first, *(s for s in shortest if s is not first)]
        # Without a place, only a sequence that outranks a running one can take its place.
        return [s for s in candidates if any(map(s.outranks, self.running))] if full else candidates

    def _decode(self, sequence: Sequence, step: Step) -> None:
        """Adds the next token of a sequence to the step, or those of all of its beams, if there is room."""
        parts = sequence.parts
        if step.stuck or sequence.state is not State.RUNNING or len(parts) > step.budget:
            return
        if all(self._make_room(part, 1, step) for part in parts):
            for part in parts:
                step.plan(part, 1, self.pace.cost(part.computed, 1))

    def _grant(self, sequence: Sequence, cost: float, step: Step) -> None:
        """Adds tokens of a sequence that cost up to ``cost`` to the step, if there is room for them."""
        if step.stuck or (sequence.state is State.WAITING and not self._may_enter(sequence, step)):
            return
        planned = step.scheduled.get(sequence, 0)
        tokens = min(sequence.lacking - planned, step.budget)
        start, cost = sequence.computed + planned, min(cost, step.allowance)
        if self.pace.cost(start, tokens) > cost:
            affordable = self.pace.tokens(start, cost)
            if not affordable and not step.scheduled:
                # It begins later than was known when the allowance was set: its prefix was found since then.
                affordable = MULTIPLE
            tokens = min(tokens, affordable)
        if tokens <= 0 or sequence.state is not State.RUNNING:
            return
        if self._make_room(sequence, planned + tokens, step):
            step.plan(sequence, tokens, self.pace.cost(start, tokens))

    def _may_enter(self, sequence: Sequence, step: Step) -> bool:
        """Admits a waiting sequence if there is room and its turn has come.

        A sequence shorter than the first in the queue overtakes it only where there is room for both, else
        short ones could keep it out forever. At most ``max_prefills`` prompts are computed at a time, but
        for one that is shorter than what each of these still lacks.
        """
        if step.closed or sequence in step.refused:
            return False
        parts = (part for s in self.running for part in s.parts)
        lacking = [n for part in parts if (n := part.remaining - step.scheduled.get(part, 0)) > 1]
        full = len(lacking) >= self.max_prefills and sequence.to_compute >= min(lacking)
        if full and not any(map(sequence.outranks, self.running)):
            return False
        head = self.waiting.first or sequence
        kept = NOTHING if sequence is head else self._room.kept_for(head)
        if self._admit(sequence, step, kept):
            return True
        step.refused.add(sequence)
        step.closed = sequence is head
        return False

    def restart(self, sequence: Sequence) -> None:
        """Has a running sequence recompute all its tokens, since its keys are not valid any longer."""
        self.running.remove(sequence)
        self._take_pages(sequence)
        sequence.page_keys.clear()
        self._enqueue(sequence)

    def check_integrity(self) -> None:
        """Checks the pages of all sequences against the pool, and the queues against each other.

        Raises:
            server.engine.page_pool.IntegrityError: they differ.
        """
        self.kv.check_integrity(part for s in self._by_id.values() for part in s.parts)
        queued = {s.id for s in self.running} | {s.id for s in self.waiting}
        if queued != set(self._by_id) or len(self.running) + len(self.waiting) != len(queued):
            raise IntegrityError("the queues and the index of sequences differ")
        if any(sequence.pages for sequence in self.waiting):
            raise IntegrityError("a waiting sequence holds pages")

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        sequence.wanted_drafts = 0  # it was asked with other tokens, and perhaps other rotary frequencies
        if (leader := self._sharing.awaited(sequence)) is not None:
            self.waiting.add_follower(sequence, leader.id)
        else:
            sequence.found = self._sharing.found(sequence)
            self.waiting.add(sequence)

    def _enqueue_followers(self, leader: Sequence) -> None:
        """Lets samples of a prompt enter: their leader is gone, or has computed pages for them."""
        for sequence in self.waiting.take_followers(leader.id):
            self._enqueue(sequence)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        for part in sequence.parts:
            step.drop(part)
        self.running.remove(sequence)
        self._take_pages(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self._enqueue(sequence)

    def _take_pages(self, sequence: Sequence) -> None:
        for part in sequence.parts:
            self.kv.release(part)
            part.state = State.FINISHED  # a beam, for which there will be another
        sequence.join()

    def _make_room(self, sequence: Sequence, tokens: int, step: Step) -> bool:
        """Gets pages for a running sequence; preempts the least urgent ones if needed, itself last."""
        while not self.kv.extend(sequence, tokens):
            if not step.preempts:
                step.stuck = True
                return False
            victim = max(self.running, key=lambda s: s.urgency)
            self._preempt(victim, step)
            if victim is sequence.head:
                return False
        return True

    def _admit(self, sequence: Sequence, step: Step, kept: Need) -> bool:
        """Moves a waiting sequence to the running ones if there is room for all pages it will hold at once.

        A more urgent sequence takes the place of less urgent ones.

        Args:
            sequence: that waits.
            step: in the making.
            kept: what must stay free for others that wait.
        """
        room = self._room
        outranked = sorted(filter(sequence.outranks, self.running), key=lambda s: s.urgency)
        need = room.need(sequence)
        shared = need._replace(pages=need.pages - self._sharing.most_shared(sequence))
        if not room.fits(shared.plus(kept), outranked):
            return False
        self._sharing.begin(sequence)
        victims = room.to_give_way(room.need(sequence), kept, outranked)
        if victims is None or (victims and not step.preempts):
            step.stuck = step.stuck or victims is not None
            self.kv.release(sequence)
            return False
        for victim in reversed(victims):
            self._preempt(victim, step)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = State.RUNNING
        self.kv.count_lookup(sequence)
        if sequence.preemptions == 0:
            sequence.cached_tokens = min(sequence.computed, len(sequence.source) or sequence.computed)
        return True
