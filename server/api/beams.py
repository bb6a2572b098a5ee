"""What a request with beam search asks for, and what does not go with it."""

from __future__ import annotations

from typing import NamedTuple

from longspan.v1 import inference_pb2
from server.api.checks import Violations
from server.api.errors import Violation
from server.api.stops import stops_from
from server.messages import Beams, Ready, StopTexts
from server.submit import EarlyStopping

_MOST_BEAMS = 16
_MOST_PENALTY = 10.0
_EARLY: dict[int, EarlyStopping] = {
    inference_pb2.EARLY_STOPPING_UNSPECIFIED: "heuristic",
    inference_pb2.EARLY_STOPPING_FULL: "full",
    inference_pb2.EARLY_STOPPING_NEVER: "never",
}


def beams_of(request: inference_pb2.GenerateRequest) -> Beams | None:
    """How a request asks to search; ``None`` for no beam search."""
    if not request.HasField("beam_search"):
        return None
    asked, strings = request.beam_search, list(request.stop.stop_strings)
    penalty = asked.length_penalty if asked.HasField("length_penalty") else 1.0
    return Beams(
        count=asked.num_beams,
        length_penalty=penalty,
        early_stopping=_EARLY[asked.early_stopping],
        stop=StopTexts(strings, request.keep_special_tokens, stops_from(request)) if strings else None,
    )


def check_beams(request: inference_pb2.GenerateRequest, max_running: int) -> Violations:
    """The faults of a request's beam search, and fields that do not go with it.

    Args:
        request: as it came.
        max_running: sequences that the engine works on at once, at most.
    """
    if not request.HasField("beam_search"):
        return
    asked, n = request.beam_search, request.n if request.HasField("n") else 1
    if not 1 <= asked.num_beams <= _MOST_BEAMS:
        sentence = f"is {asked.num_beams}; it may be 1 to {_MOST_BEAMS}"
        yield Violation("beam_search.num_beams", sentence)
    elif asked.num_beams > max_running:
        sentence = f"is {asked.num_beams}; beams run at once, and this server runs {max_running} sequences"
        yield Violation("beam_search.num_beams", f"{sentence} (--max-running)")
    elif n > asked.num_beams:
        yield Violation("n", f"is {n}, more than beam_search.num_beams, {asked.num_beams}")
    if not abs(asked.length_penalty) <= _MOST_PENALTY:
        sentence = (
            f"is {asked.length_penalty:g}; it must be a number from -{_MOST_PENALTY:g} to {_MOST_PENALTY:g}"
        )
        yield Violation("beam_search.length_penalty", sentence)
    if asked.early_stopping not in _EARLY:
        yield Violation("beam_search.early_stopping", f"is {asked.early_stopping}, which has no meaning")
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        if getattr(request.sampling, name):
            yield Violation(
                f"sampling.{name}", "is for sampling, and beam_search takes the best; leave it out"
            )


class BeamRoom(NamedTuple):
    """The KV cache as beams find it, all of which have to be there at once.

    Attributes:
        page_size: tokens per page.
        pages: that can be allocated.
        each: the most that one sequence holds at once.
    """

    page_size: int
    pages: int
    each: int

    @classmethod
    def of(cls, ready: Ready) -> BeamRoom:
        """That of an engine."""
        return cls(ready.page_size, ready.pages_total, ready.pages_per_sequence)

    def tokens(self, beams: int, prompt: int, most: int) -> int:
        """How many tokens each of so many beams surely has room for, at most ``most``; maybe below 1.

        Args:
            beams: how many.
            prompt: tokens that they have in common, those that a decoder begins with included.
            most: that one sequence has room for.
        """
        if beams * self.each <= self.pages:
            return most
        shared = prompt // self.page_size
        return min(most, (shared + (self.pages - shared) // beams) * self.page_size - prompt)
