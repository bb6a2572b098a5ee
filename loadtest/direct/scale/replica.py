"""A simulated replica: the engine's own scheduler and pages, and pretended steps that take processor time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import simpy

from loadtest.direct.scale.costs import Costs, Work
from loadtest.direct.scale.processors import Loop, Processors
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
        self._arrival = env.event()
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
        env.process(self._run())

    def ask(self, call: int, prompt: list[int], output_tokens: int) -> None:
        """Takes a call, which the server process checks and sends to the engine."""
        request = Submit(id=call, prompt=prompt, sampling=_GREEDY, max_tokens=output_tokens)
        self._server.do(self._costs.server.request, partial(self._submit, request))

    def _submit(self, request: Submit) -> None:
        self._inbox.append(request)
        if not self._arrival.triggered:
            self._arrival.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        """The engine process: messages between two steps, a step, its message."""
        scheduler = self._scheduler
        while True:
            if not (self._inbox or scheduler.running or scheduler.waiting):
                yield self._arrival
            self._arrival = self._env.event()
            while self._inbox:
                scheduler.add(self._inbox.popleft())
            scheduled = scheduler.schedule()
            assert scheduled, "sequences are queued, but nothing is scheduled"
            chunks = [(sequence.computed, tokens) for sequence, tokens in scheduled]
            work, began = Work.of(chunks), self._env.now
            seconds = self._costs.alone.of(work)
            task = self._processors.work(seconds, min(1.0, seconds / self._costs.beside.of(work)))
            yield task.done | self._arrival if scheduler.given_up else task.done
            if not task.done.processed:
                self._processors.cancel(task)
                for sequence, _ in scheduled:
                    self._kv.retract(sequence, 0)
                self.given_up += 1
                continue
            prompts = pace.Work.of(chunk for chunk in chunks if chunk[1] > 1)
            scheduler.pace.observe(prompts, work.decodes, self._env.now - began)
            self._send(self._outputs(scheduled))

    def _outputs(self, scheduled: list[Scheduled]) -> list[Output]:
        self.steps += 1
        for sequence, tokens in scheduled:
            self._kv.advance(sequence, tokens)
        outputs = []
        for sequence, _ in scheduled:
            if not sequence.remaining:
                # No two calls say the same, so that only what was said in a session is found again.
                self._kv.append(sequence, (sequence.id * 8191 + sequence.output_len) & 0xFFFFFFFF)
                finish = sequence.finish_reason(-1, self._costs.limits.context_length)
                if finish is not None:
                    self._scheduler.remove(sequence.id)
                outputs.append(Output(sequence.id, sequence, finish is not None))
        return outputs

    def _send(self, outputs: list[Output]) -> None:
        cost = self._costs.server
        self._server.do(cost.message + cost.token * len(outputs), partial(self._told, outputs))
