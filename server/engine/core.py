"""The engine without its process: sequences in, outputs out, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Set
from pathlib import Path

from attention.patterns.base import ContentPattern
from server.engine.accepting import Accepting
from server.engine.costs import Cost, StepCosts
from server.engine.flight import Flight
from server.engine.isolated import IsolatedRunner
from server.engine.kv_manager import KVManager, most_pages
from server.engine.pace import EXPECTED_REACH, Pace
from server.engine.runner import Runner
from server.engine.scheduler import Scheduled, Scheduler
from server.engine.sequence import Sequence
from server.engine.source import laid_out
from server.engine.speculation.drafter import Drafter
from server.engine.stop_texts import TextsOfBeams
from server.engine.team import Team
from server.engine.totals import Totals
from server.messages import Beams, SequenceOutput, Stats, StepOutput, Submit
from server.models.executors.base import GivenUpError

_NOTHING = Cost(0, 0)
_NO_SEQUENCES: Set[Sequence] = frozenset()


class EngineCore:
    """Runs sequences to their ends: schedule, run, sample, output.

    With ``ahead``, a step is launched before the previous one is collected, so that the device finds the next
    step waiting while the host reads tokens, sends outputs and schedules. Such a step takes the previous
    step's tokens on the device. Where these show that a sequence has ended, it computes one token too many:
    no client gets it, and the pages are free for others at once. Its writes do no harm, since the device
    computes in order: a sequence that gets the pages writes them in a later step, and reads only what was
    written since.

    Args:
        runner: the model over its paged cache.
        context_length: most tokens of a sequence.
        source_length: of an encoder-decoder, most tokens of a source.
        max_running: sequences that run at once, at most.
        max_batch_tokens: tokens of a step, at most.
        max_prefills: prompts of more than a step that are computed at a time, at most.
        prompt_step_seconds: how long the prompt tokens of a step take, about; ``None`` for any time.
        aging_seconds: waiting that raises a priority by one; ``None`` if waiting raises none.
        prefix_cache: share the pages of equal prompts.
        ahead: launch a step before the previous one is collected, where that is possible. Useful on a device
            that computes asynchronously; a CPU has computed a step when it is launched.
        check_integrity: check the allocator's bookkeeping after every step.
        team: the threads that compute, where their number follows what the machine gives.
        drafter: guesses tokens for the steps to verify; not together with ``ahead``.
        arrivals: a descriptor that has something to read once a message has come. Where the executor can, a
            step of a long prompt that held up nothing is given up then, so that the message need not wait.
        tokenizer: the folder of the model's tokenizer, for stop strings of beams.

    Attributes:
        costs: what its steps cost at least.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context_length: int,
        source_length: int = 0,
        max_running: int,
        max_batch_tokens: int,
        max_prefills: int = 8,
        prompt_step_seconds: float | None = None,
        aging_seconds: float | None = None,
        prefix_cache: bool = True,
        ahead: bool = False,
        check_integrity: bool = False,
        team: Team | None = None,
        drafter: Drafter | None = None,
        arrivals: int | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        assert drafter is None or not ahead
        self.runner = runner
        self.drafter = drafter
        self.team = team
        self._isolated = IsolatedRunner(runner, team, at_once=not ahead)
        self.context_length = context_length
        self.source_length = source_length
        self.ahead = ahead
        self.check_integrity = check_integrity
        expired = runner.attention.expired
        cache = runner.cache
        pattern = runner.attention.pattern
        self.kv = KVManager(
            cache.pages,
            cache.page_size,
            prefix_cache=prefix_cache,
            expired=expired,
            prompts_only=isinstance(pattern, ContentPattern) and pattern.decoded_keys_differ,
            salt=None if runner.rope is None else runner.rope.salt,
        )
        needed = most_pages(context_length, max_batch_tokens, cache.page_size, expired)
        if needed > self.kv.pool.total:
            raise ValueError(f"a context of {context_length} takes {needed} pages of {self.kv.pool.total}")
        self._totals = Totals(runner.device)
        self.costs = StepCosts(runner.executor.model, runner.attention.layers, cache)
        pace = Pace(prompt_step_seconds, self.costs.reach or EXPECTED_REACH)
        gives_up = arrivals is not None and runner.executor.gives_up and drafter is None
        self._arrivals = arrivals if gives_up else None
        self.scheduler = Scheduler(
            self.kv, max_running, max_batch_tokens, max_prefills, pace, aging_seconds, gives_up
        )
        self.accepting = Accepting(runner, self.scheduler, self._totals, context_length)
        self._texts = TextsOfBeams(tokenizer)
        self._flight: Flight | None = None
        self._failed: list[SequenceOutput] = []
        self._ended = 0.0

    def submit(self, request: Submit) -> None:
        """Queues a sequence.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context; beams have no room, or stop
                strings and no tokenizer that finds them.
        """
        if request.start:
            if len(request.prompt) > self.source_length:
                raise ValueError(
                    f"a source of {len(request.prompt)} tokens is longer than {self.source_length}"
                )
            request = laid_out(request, self.kv.page_size)
        if not 0 < len(request.prompt) < self.context_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens does not fit a context of {self.context_length}"
            )
        beams, text = request.beams, None
        if beams is not None:
            self._check_beams(request, beams)
            text = None if beams.stop is None else self._texts.begin(beams.stop)
        self.scheduler.add(request, text)

    def _check_beams(self, request: Submit, beams: Beams) -> None:
        """Refuses beams that could not all run at once, which they have to."""
        count, prompt, budget = beams.count, len(request.prompt), self.scheduler.max_batch_tokens
        tokens = prompt + request.max_tokens
        if tokens > self.context_length or count > self.scheduler.max_running:
            raise ValueError(f"{count} beams of {tokens} tokens: too many to run at once, or too long")
        pages = self.kv.most_of_beams(prompt, tokens, count, budget)
        if pages > self.kv.pool.total:
            raise ValueError(f"{count} beams can come to hold {pages} pages of {self.kv.pool.total}")

    def abort(self, sequence_id: int) -> None:
        """Forgets a sequence and frees its pages at once; unknown ids are ignored.

        The outputs leave out its tokens of a step in flight.
        """
        self.scheduler.remove(sequence_id)

    @property
    def has_work(self) -> bool:
        """Whether some sequence is not finished."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> StepOutput:
        """Computes one step and returns its output.

        An error in it ends the sequences that cause it (see ``server.engine.isolated``).

        Raises:
            server.engine.page_pool.IntegrityError: the bookkeeping is wrong, where it is checked.
            Exception: an error that is no sequence's, of the device, of drafting or of this class; the engine
                can't go on.
        """
        began = time.monotonic()
        flight, self._flight = self._flight, None
        if flight is None or len(flight.void()) == len(flight.scheduled):
            flight = self._launch(began, self._schedule())
        if flight is not None and self.ahead and flight.output is None:
            self._flight = self._launch_ahead(flight)
        outputs, cost = ([], _NOTHING) if flight is None else self._collect(flight)
        outputs, self._failed = [*self._failed, *outputs], []
        if self.check_integrity:
            self.scheduler.check_integrity()
        ended = time.monotonic()
        prompt_tokens = computed = 0
        if flight is not None:
            prompt_tokens = flight.prompt_tokens
            computed = sum(tokens for _, tokens in flight.scheduled)
            began = max(flight.began, self._ended)  # before that the device computed the step before
        self._ended = ended
        if flight is not None and (self.drafter is None or not self.drafter.caught_up):
            self.scheduler.pace.observe(flight.work, flight.decodes, ended - began)
            if self.drafter is not None and not flight.work.tokens:
                self.drafter.observe(ended - began)
        stats = self.stats(prompt_tokens, computed - prompt_tokens, ended - began, cost)
        return StepOutput(ended, outputs, stats, self.kv.take_events())

    def _schedule(self) -> list[Scheduled]:
        if self.drafter is None:
            return self.scheduler.schedule()
        self.drafter.ask([part for sequence in self.scheduler.running for part in sequence.parts])
        scheduled = self.scheduler.schedule()
        # Not watched by the team: of drafting much is computed by one thread, as if the others had no cores.
        self.drafter.draft(scheduled)
        return scheduled

    def _launch(
        self, began: float, scheduled: list[Scheduled], before: Flight | None = None
    ) -> Flight | None:
        if not scheduled:
            return None
        fresh = {one.sequence for one in scheduled if one.sequence.started is None}
        for sequence in fresh:
            sequence.started = began
        self.runner.copy(self.kv.take_copies())
        if before is None:
            watched = self._arrivals if self.scheduler.given_up else None
            try:
                computed = self._isolated.launch(scheduled, watched)
            except GivenUpError:
                self._take_back(scheduled, fresh)
                return None
        elif (ahead := self._isolated.launch_ahead(scheduled, before.launched)) is not None:
            computed = ahead
        else:
            for sequence in fresh:
                sequence.started = None
            return None
        if computed.failed:
            self._failed += self.accepting.end(computed.failed, fresh)
            if not computed.scheduled:
                self._isolated.prove(self.kv, start=[0] if self.source_length else [])
                return None
        scheduled, launched = computed.scheduled, computed.launched
        flight = Flight.of(began, computed, fresh)
        for sequence in launched.sequences:
            sequence.pending += 1
        for sequence, tokens in scheduled:
            self.kv.advance(sequence, tokens)
        return flight

    def _take_back(self, scheduled: list[Scheduled], fresh: set[Sequence]) -> None:
        """Leaves sequences as they were before a step that was given up."""
        for sequence in fresh:
            sequence.started = None
        for sequence, _ in scheduled:
            self.kv.retract(sequence, 0)

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """Launches the step after the one in flight, as far as it does not depend on that one's tokens."""
        began = time.monotonic()
        held = {sequence for sequence in flight.launched.sequences if self._is_held(sequence)}
        held.update(flight.launched.searches)
        return self._launch(began, self.scheduler.schedule_ahead(held), flight)

    def _is_held(self, sequence: Sequence) -> bool:
        """Whether a sequence surely ends with its pending token, or can't go on before that is known."""
        return (
            sequence.request.sampling.no_repeat_ngram > 0
            or sequence.output_len + sequence.pending >= sequence.request.max_tokens
            or sequence.expected >= self.context_length
            or (self.runner.rope is not None and self.runner.rope.stale(sequence.expected))
        )

    def _collect(self, flight: Flight) -> tuple[list[SequenceOutput], Cost]:
        scheduled, launched = flight.scheduled, flight.launched
        void = flight.void() if self.ahead else _NO_SEQUENCES
        output = self.runner.collect(launched, void) if flight.output is None else flight.output
        self._totals.read(launched.pages)
        cost = self.costs.of(sum(tokens for _, tokens in scheduled), launched.rows, launched.pages.by_layer)
        if self._flight is not None:
            for sequence in output.late:
                self._flight.take_back(sequence)
        return self.accepting.outputs(flight, output, void), cost

    def stats(
        self, prompt_tokens: int = 0, decode_tokens: int = 0, seconds: float = 0.0, cost: Cost = _NOTHING
    ) -> Stats:
        """The load now, with the figures of the step that led to it."""
        return self._totals.stats(self.scheduler, prompt_tokens, decode_tokens, seconds, cost)
