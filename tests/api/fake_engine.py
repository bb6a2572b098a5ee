"""An engine without a model, behind the real link's streams: deterministic tokens, one step after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from server.engine.ipc.link import EngineClient
from server.messages import (
    Abort,
    FinishReason,
    Logprob,
    Measured,
    PositionLogprob,
    Ready,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
)

CONTEXT = 200
VOCABULARY = 300
PAGES = 1000

READY = Ready(
    architecture="FakeForCausalLM",
    parameters=1,
    layers=1,
    vocabulary_size=VOCABULARY,
    context_length=CONTEXT,
    dtype="float32",
    kv_dtype="float16",
    weights="int4",
    device="cpu",
    attention_backend="full",
    attention_pattern="full",
    attention_kernel="reference",
    attention_reason="it is a fake",
    kv_memory_share=0.3,
    max_batch_tokens=512,
    max_running=4,
    executor="fake",
    executor_reason="it computes nothing",
    attention_options={"window": "8"},
    page_size=16,
    pages_total=PAGES,
    pages_per_sequence=PAGES,
    kv_bytes=1,
    weight_bytes=2,
    memory_total=4,
    memory_used=3,
    measured=Measured(bandwidth=1e12, matrix_rate=2e12),
    cuda_graphs=0,
    threads=1,
    versions={"torch": "0"},
)


def alphabet(request: Submit, position: int) -> int:
    """The default output: a b c ... z a b ..., shifted by the seed's last digit."""
    return ord("a") + (request.sampling.seed % 10 + position) % 26


def logprob(position: int, top: int) -> PositionLogprob:
    """Log probabilities that name their position."""
    entries = [Logprob(token, -float(rank), rank) for rank, token in enumerate(range(97, 97 + top), start=1)]
    return PositionLogprob(Logprob(97 + position % 26, -0.5 - position, 1), entries)


class FakeEngine(EngineClient):
    """Runs every sequence at once, one token per step each.

    Attributes:
        tokens: which token a sequence gets at a position of its output.
        step_seconds: pause between steps.
        per_step: tokens per step and sequence.
        open: while not set, no step runs.
        submitted: all sequences ever.
        aborted: ids that were aborted here.
    """

    tokens: Callable[[Submit, int], int] = staticmethod(alphabet)

    def start_now(self) -> None:
        """Loads."""
        self.step_seconds = 0.0
        self.per_step = 1
        self.submitted: list[Submit] = []
        self.aborted: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self._work: dict[int, tuple[Submit, int]] = {}
        self._more = asyncio.Event()
        self.ready = READY
        self.state = "ready"
        self._ready_or_dead.set()
        self._tasks = [asyncio.create_task(self._loop())]

    @property
    def running(self) -> int:
        """Sequences that the engine knows."""
        return len(self._work)

    def _send(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self.submitted.append(message)
            self._work[message.id] = (message, 0)
        elif isinstance(message, Abort):
            for id_ in message.ids:
                self.aborted.append(id_)
                self._work.pop(id_, None)
        elif isinstance(message, Shutdown):
            self._work.clear()
        self._more.set()

    async def stop(self) -> None:
        self.state = "stopped"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end_streams("the server is shutting down")

    def die(self, reason: str) -> None:
        """Ends as a killed process does."""
        for task in self._tasks:
            task.cancel()
        self.state = "dead"
        self._reason = reason
        self._work.clear()
        self._end_streams(reason)
        self._dead.set()

    async def _loop(self) -> None:
        while True:
            await self.open.wait()
            if not self._work:
                self._more.clear()
                await self._more.wait()
                continue
            begun = time.monotonic()
            output = [self._advance(id_, begun) for id_ in list(self._work)]
            stats = Stats(
                running=len(self._work),
                pages_total=PAGES,
                pages_used=len(self._work),
                prefix_queries=10 * len(self.submitted),
                prefix_hits=5 * len(self.submitted),
                decode_tokens=len(output),
                step_seconds=time.monotonic() - begun,
                bytes_moved=1000 * len(output),
                flops=3000 * len(output),
                memory_used=3 * 10**9,
            )
            self._deliver(StepOutput(time.monotonic(), output, stats))
            await asyncio.sleep(self.step_seconds)

    def _advance(self, id_: int, now: float) -> SequenceOutput:
        request, done = self._work[id_]
        first = done == 0
        output = SequenceOutput(id_, [], started=now if first else None, cached_tokens=3 if first else 0)
        while len(output.tokens) < self.per_step and output.finish is None:
            forced = done < len(request.forced)
            token = request.forced[done] if forced else self.tokens(request, done)
            done += 1
            output.tokens.append(token)
            if token in request.stop_token_ids and done >= request.min_tokens and not forced:
                output.finish = FinishReason.STOP
            elif done >= request.max_tokens:
                output.finish = FinishReason.LENGTH
        if request.beams is not None:
            output.searched_tokens = request.beams.count * len(output.tokens)
        if request.logprobs is not None:
            begin = done - len(output.tokens)
            output.logprobs = [logprob(position, request.logprobs) for position in range(begin, done)]
        if first and request.prompt_logprobs is not None:
            output.prompt_logprobs = [
                logprob(i, request.prompt_logprobs) for i in range(len(request.prompt) - 1)
            ]
        self._work[id_] = (request, done)
        if output.finish is not None:
            del self._work[id_]
        return output
