"""A client of the pretended server: it knows what every answer must be."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.ipc.link import EngineDeadError, OutputStream
from server.messages import SequenceOutput, Submit
from tests.engine.simulation.oracle import answers

_MOST = 1000


class Reader:
    """Reads the stream of one request and checks it.

    Args:
        stream: of the link.
        requests: its samples.
        context_length: of the engine.
        tick: of its submission.
        deadline: the tick at which it gives up; ``None`` for never.

    Attributes:
        stalled: ticks for which it does not read.
        idle: ticks since it was submitted in which it could have read.
        complete: it has all that it is to get.
        undisturbed: it ended by itself.
    """

    def __init__(
        self,
        stream: OutputStream,
        requests: Iterable[Submit],
        context_length: int,
        tick: int,
        deadline: int | None,
    ) -> None:
        self._stream = stream
        requests = list(requests)
        self._requests = {i: request for request in requests for i in request.ids}
        self._answers = {i: a for one in requests for i, a in answers(one, context_length).items()}
        self._width = sum(1 if one.beams is None else one.beams.count for one in requests)
        self._found: dict[int, list[int]] = {}
        self._open = set(self._requests)
        self.began, self.deadline = tick, deadline
        self.stalled = self.idle = 0
        self.complete = False
        self.undisturbed = True

    @property
    def ids(self) -> list[int]:
        return list(self._requests)

    @property
    def searches(self) -> bool:
        """Whether it asked for beams, which end together."""
        return any(request.beams is not None for request in self._requests.values())

    @property
    def open(self) -> int:
        """Samples or beams that have not ended."""
        return self._width if self.searches and self._open else len(self._open)

    def read(self) -> None:
        """Takes what has come."""
        while self._open and (self._stream._outputs or self._stream._error):
            taken = self._stream.take(_MOST)
            try:
                taken.send(None)
            except StopIteration as result:
                for output, _ in result.value:
                    self._accept(output)
            else:
                taken.close()  # what had come was of samples that were aborted
        self.complete = not self._open

    def read_to_the_end(self) -> None:
        """Reads the stream of an engine that has died."""
        try:
            self.read()
            assert self.complete, "a stream goes on after its engine's death"
        except EngineDeadError:
            assert self._open
            self.undisturbed = False
            self.complete = True

    def abort(self, ids: Iterable[int]) -> None:
        ids = list(ids)
        self._stream.abort(ids)
        self._open -= set(ids)
        self.undisturbed = False
        self.complete = not self._open

    def _accept(self, output: SequenceOutput) -> None:
        assert output.id in self._open, f"sequence {output.id} tells more after its end"
        request, expected = self._requests[output.id], self._answers[output.id]
        first = output.id not in self._found and output.id == request.id
        assert (output.started is not None) == first
        found = self._found.setdefault(output.id, [])
        owed = len(request.prompt) - 1 if request.prompt_logprobs is not None else None
        if output.tokens and not found:
            assert owed == (None if output.prompt_logprobs is None else len(output.prompt_logprobs))
        found += output.tokens
        assert found == expected.tokens[: len(found)], f"sequence {output.id}: wrong tokens"
        if output.finish is not None:
            assert (found, output.finish) == (expected.tokens, expected.finish), (
                f"sequence {output.id} ends early"
            )
            self._open.discard(output.id)
