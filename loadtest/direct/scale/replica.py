"""A simulated replica: the engine's own scheduler and pages, and pretended steps that take processor time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import simpy

from loadtest.direct.scale.costs import Costs, Work
from loadtest.direct.scale.processors import Loop, Processors, Speeds, Task, then
from server.engine import pace
from server.engine.kv_manager import KVManager
from server.engine.scheduler import Scheduled, Scheduler
from server.engine.sequence import Sequence
from server.submit import Sampling, Submit

_GREEDY = Sampling(temperature=0.0)


@dataclass(slots=True)
class Output:
    """A token of a call.

    Attributes:
        call: its number.
        sequence: with its tokens so far.
        finished: it is the last.
    """

    call: int
    sequence: Sequence
    finished: bool


class Replica:
    """A server process and an engine process.

    Args:
        env: simulated time.
        processors: that both share with all others on their machine.
        costs: of both.
        told: gets a step's outputs once the server process has sent them.

    Attributes:
        steps: that the engine has computed.
        given_up: steps that it has not.
    """

    def __init__(
        self,
        env: simpy.Environment,
        processors: Processors,
        costs: Costs,
        told: Callable[[list[Output]], object],
    ) -> None:
        self._env, self._processors, self._costs, self._told = env, processors, costs, told
        self._server = Loop(processors)
        self._inbox: deque[Submit] = deque()
        self._task: Task | None = None
        self._scheduled: list[Scheduled] = []
        self._woken = False
        limits = costs.limits
        self._kv = KVManager(limits.pages, limits.page_size)
        self._scheduler = Scheduler(
            self._kv,
            limits.max_running,
            limits.max_batch_tokens,
            limits.max_prefills,
            pace.Pace(limits.prompt_step_seconds or None),
            limits.aging or None,
            limits.gives_up,
            clock=lambda: env.now,
        )
        self.steps = self.given_up = 0

    def ask(self, call: int, prompt: list[int], output_tokens: int) -> None:
        """Takes a call, which the server process checks and sends to the engine."""
        request = Submit(id=call, prompt=prompt, sampling=_GREEDY, max_tokens=output_tokens)
        self._server.do(self._costs.server.request, partial(self._submit, request))

    def _submit(self, request: Submit) -> None:
        self._inbox.append(request)
        if self._task is None:
            if not self._woken:
                self._woken = True
                then(self._env.timeout(0), self._begin)  # with what else comes at the same time
        elif self._scheduler.given_up and self._processors.cancel(self._task):
            for sequence, _ in self._scheduled:
                self._kv.retract(sequence, 0)
            self.given_up += 1
            self._begin()

    def _begin(self, woken: simpy.Event | None = None) -> None:
        """The engine process between two steps: takes messages and begins a step."""
        scheduler, self._task, self._woken = self._scheduler, None, False
        while self._inbox:
            scheduler.add(self._inbox.popleft())
        if not (scheduler.running or scheduler.waiting):
            return
        self._scheduled = scheduler.schedule()
        assert self._scheduled, "sequences are queued, but nothing is scheduled"
        chunks = [(sequence.computed, tokens) for sequence, tokens in self._scheduled]
        work, costs = Work.of(chunks), self._costs
        seconds = costs.alone.of(work)
        beside = min(1.0, seconds / costs.beside.of(work))
        speeds = Speeds(beside, min(beside, seconds / costs.crowded.of(work)))
        done = partial(self._end, chunks, work.decodes, self._env.now)
        self._task = self._processors.work(seconds, done, speeds)

    def _end(self, chunks: list[tuple[int, int]], decodes: int, began: float) -> None:
        prompts = pace.Work.of(chunk for chunk in chunks if chunk[1] > 1)
        self._scheduler.pace.observe(prompts, decodes, self._env.now - began)
        outputs, cost = self._outputs(), self._costs.server
        self._server.do(cost.message + cost.token * len(outputs), partial(self._told, outputs))
        self._begin()

    def _outputs(self) -> list[Output]:
        self.steps += 1
        for sequence, tokens in self._scheduled:
            self._kv.advance(sequence, tokens)
        outputs = []
        for sequence, _ in self._scheduled:
            if not sequence.remaining:
                # No two calls say the same, so that only what was said in a session is found again.
                self._kv.append(sequence, (sequence.id * 8191 + sequence.output_len) & 0xFFFFFFFF)
                finish = sequence.finish_reason(-1, self._costs.limits.context_length)
                if finish is not None:
                    self._scheduler.remove(sequence.id)
                outputs.append(Output(sequence.id, sequence, finish is not None))
        return outputs
