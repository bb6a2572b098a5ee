"""Steps in which an error ends the sequences that cause it, and no other.

A step that raises is computed again in halves, and these in halves, until what raises is one sequence by
itself, or the beams of one search. Until a step is collected nothing of it is booked, so that only the states
of samplers have to be made anew: keys and values are written again where they were written before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch

from attention.reading import LayerReads, Pages
from server.engine.kv_manager import KVManager
from server.engine.runner import Launched, Runner, RunOutput
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.engine.source import laid_out
from server.engine.team import Team
from server.messages import Sampling, Submit
from server.models.executors.base import GivenUpError

log = logging.getLogger("longspan.engine")

_FATAL = (
    torch.AcceleratorError,  # the device, which fails whatever comes next
    AssertionError,  # the engine contradicts itself: computing on could give one client another's tokens
)


@dataclass(slots=True)
class Computed:
    """A step, as far as it could be computed.

    Attributes:
        scheduled: what is computed.
        launched: the pass.
        output: its results, where they are known already.
        failed: sequences that can't be computed, of beams their group.
    """

    scheduled: list[Scheduled]
    launched: Launched
    output: RunOutput | None = None
    failed: list[Sequence] = field(default_factory=list)


class IsolatedRunner:
    """Launches steps.

    Args:
        runner: computes them.
        team: the threads that compute, where their number follows what the machine gives.
        at_once: collect a step when it is launched, as its device has computed it by then.
    """

    def __init__(self, runner: Runner, team: Team | None, *, at_once: bool) -> None:
        self._runner, self._team, self._at_once = runner, team, at_once

    def launch(self, scheduled: list[Scheduled], watched: int | None = None) -> Computed:
        """Launches a step while none is in flight; one that raises is computed in parts, and these collected.

        Args:
            scheduled: what to compute.
            watched: see ``StepInput``.

        Raises:
            GivenUpError: something came on ``watched``.
            torch.AcceleratorError: the device fails.
            AssertionError: the engine contradicts itself.
        """
        try:
            launched = self._launch(scheduled, None, watched)
            return Computed(scheduled, launched, self._runner.collect(launched) if self._at_once else None)
        except (*_FATAL, GivenUpError):
            raise
        except Exception as error:
            self._tell(scheduled, error)
        return self._together(scheduled)

    def launch_ahead(self, scheduled: list[Scheduled], before: Launched) -> Computed | None:
        """Launches a step after one in flight; ``None`` if it raises: it can be launched later.

        Raises:
            torch.AcceleratorError: the device fails.
            AssertionError: the engine contradicts itself.
        """
        try:
            return Computed(scheduled, self._launch(scheduled, before))
        except _FATAL:
            raise
        except Exception as error:
            log.warning("a step launched ahead fails (%s); it is launched again", type(error).__name__)
        return None

    def prove(self, kv: KVManager, start: list[int]) -> None:
        """Computes a token of no request, once none of a step's sequences could be computed.

        Args:
            kv: has a free page, of an encoder-decoder two.
            start: what the decoder of an encoder-decoder begins with; empty for other models.

        Raises:
            Exception: the fault is not the sequences'.
        """
        log.warning("none of a step's sequences can be computed; a token of no request is tried")
        request = Submit(id=-1, prompt=[0], sampling=Sampling(temperature=0.0), max_tokens=1, start=start)
        probe = Sequence(laid_out(request, kv.page_size) if start else request, 0)
        if not kv.extend(probe, probe.total):
            raise RuntimeError("no sequence of a step can be computed, and no page is free to try another")
        try:
            self._runner.collect(self._launch([Scheduled(probe, probe.total)], None))
        finally:
            kv.release(probe)

    def _launch(
        self, scheduled: list[Scheduled], before: Launched | None, watched: int | None = None
    ) -> Launched:
        launch = partial(self._runner.launch, scheduled, before)
        if watched is not None:
            launch = partial(launch, watched=watched)
        return launch() if self._team is None else self._team.compute(launch)

    def _tell(self, scheduled: list[Scheduled], error: Exception) -> None:
        """To be called in the error's handler."""
        for sequence, _ in scheduled:
            sequence.sampler = None  # it may have recorded tokens that are sampled again
        if _halves(scheduled):
            log.warning(
                "%d sequences fail together (%s); half are tried", len(scheduled), type(error).__name__
            )
            return
        sequence, tokens = scheduled[0]
        log.exception(
            "sequence %d fails: its tokens %d to %d can't be computed",
            sequence.id,
            sequence.computed,
            sequence.computed + tokens - 1,
        )

    def _together(self, scheduled: list[Scheduled]) -> Computed:
        """The parts of a step that raised; out of the handler, whose traceback holds the step's tensors."""
        failed: list[Sequence] = []
        parts: list[tuple[list[Scheduled], Launched, RunOutput]] = []
        left = _halves(scheduled)
        if not left:
            failed.append(scheduled[0].sequence.head)
        while left:
            part = left.pop(0)
            try:
                launched = self._launch(part, None)
                parts.append((part, launched, self._runner.collect(launched)))
                continue
            except _FATAL:
                raise
            except Exception as error:
                self._tell(part, error)
            halves = _halves(part)
            if not halves:
                failed.append(part[0].sequence.head)
            left = halves + left
        launches = [launched for _, launched, _ in parts]
        outputs = [output for *_, output in parts]
        return Computed(
            [one for part, *_ in parts for one in part],
            Launched(
                [sequence for launched in launches for sequence in launched.sequences],
                None,
                {},
                [],
                sum(launched.rows for launched in launches),
                _sum([launched.pages for launched in launches]),
            ),
            RunOutput(
                [tokens for output in outputs for tokens in output.tokens],
                [logprobs for output in outputs for logprobs in output.logprobs],
                [],
                {group: found for output in outputs for group, found in output.searches.items()},
                [owed for output in outputs for owed in output.prompt_logprobs],
            ),
            failed,
        )


def _halves(scheduled: list[Scheduled]) -> list[list[Scheduled]]:
    """Two parts of a step; none where it is one sequence, or the beams of one search, which stay together."""
    heads: dict[Sequence, list[Scheduled]] = {}
    for one in scheduled:
        heads.setdefault(one.sequence.head, []).append(one)
    units = list(heads.values())
    middle = len(units) // 2
    return [list(chain(*units[:middle])), list(chain(*units[middle:]))] if middle else []


def _sum(pages: list[Pages]) -> Pages:
    by_layer = [
        LayerReads(
            same[0].layers,
            sum(reads.pages for reads in same),
            sum(reads.pairs for reads in same),
            sum(reads.summaries for reads in same),
        )
        for same in zip(*(one.by_layer for one in pages), strict=True)
    ]
    return Pages(sum(one.read for one in pages), sum(one.skipped for one in pages), tuple(by_layer))
