"""A request with beam search in the engine: each step's beams are sequences of one token each.

A beam's tokens so far are known, so it is a prompt like others, and its pages are those of the beam that it
continues, found in the prefix cache; tokens behind the last full page are computed again. So preemption,
mixed batches, priorities and aborts are those of all sequences.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from longspan.v1 import inference_pb2
from server.api.beam_search import Beam, Beams, BeamSearch, EarlyStopping, best_of
from server.api.checks import Violations
from server.api.errors import Violation
from server.engine.ipc.output import OutputStream
from server.engine.repeats import TYPE, repeating
from server.messages import FinishReason, Sampling, SequenceOutput, Submit

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
    asked = request.beam_search
    penalty = asked.length_penalty if asked.HasField("length_penalty") else 1.0
    return Beams(asked.num_beams, penalty, _EARLY[asked.early_stopping])


def check_beams(request: inference_pb2.GenerateRequest, sampling: Sampling) -> Violations:
    """The faults of a request's beam search, and fields that do not go with it.

    Args:
        request: as it came.
        sampling: as it is in force.
    """
    if not request.HasField("beam_search"):
        return
    asked, n = request.beam_search, request.n if request.HasField("n") else 1
    if not 1 <= asked.num_beams <= _MOST_BEAMS:
        sentence = f"is {asked.num_beams}; it may be 1 to {_MOST_BEAMS}"
        yield Violation("beam_search.num_beams", sentence)
    elif n > asked.num_beams:
        yield Violation("n", f"is {n}, more than beam_search.num_beams, {asked.num_beams}")
    if not abs(asked.length_penalty) <= _MOST_PENALTY:
        sentence = (
            f"is {asked.length_penalty:g}; it must be a number from -{_MOST_PENALTY:g} to {_MOST_PENALTY:g}"
        )
        yield Violation("beam_search.length_penalty", sentence)
    if asked.early_stopping not in _EARLY:
        yield Violation("beam_search.early_stopping", f"is {asked.early_stopping}, which has no meaning")
    if sampling.penalized:
        yield Violation("beam_search", "has no penalties; set these to neutral, repetition_penalty to 1")
    for name in ("temperature", "top_k", "top_p", "min_p", "logit_bias", "seed"):
        if getattr(request.sampling, name):
            yield Violation(
                f"sampling.{name}", "is for sampling, and beam_search takes the best; leave it out"
            )
    given = {
        "logprobs": request.HasField("logprobs"),
        "stop.stop_strings": bool(request.stop.stop_strings),
    }
    for name in filter(given.get, given):
        yield Violation(name, "does not go with beam_search; leave it out")


async def search(
    template: Submit,
    beams: Beams,
    banned: Sequence[int],
    outputs: Sequence[int],
    submit: Callable[[list[Submit]], OutputStream],
    new_ids: Callable[[int], list[int]],
) -> list[tuple[SequenceOutput, float]]:
    """Runs a search to its end.

    Args:
        template: the request as one greedy sequence.
        beams: how to search.
        banned: tokens that are never output.
        outputs: ids for the best beams, the best first.
        submit: to the engine.
        new_ids: for so many sequences.

    Returns:
        The best beams as output of these ids, with the time of the last step; none if it was aborted.
    """
    found = BeamSearch(beams, template.stop_token_ids, template.max_tokens)
    begun = array(TYPE, template.start or template.prompt)
    first: SequenceOutput | None = None
    when = 0.0
    while found.running:
        tasks = [_Step(template, beam, banned, begun) for beam in found.running]
        ids = new_ids(len(tasks))
        stream = submit([task.submit(id_, found.wanted) for task, id_ in zip(tasks, ids, strict=True)])
        answers: dict[int, SequenceOutput] = {}
        while taken := await stream.take(len(ids)):
            when = taken[-1][1]
            for output, _ in taken:
                first = output if first is None else first
                answers[output.id] = output
        if len(answers) < len(ids):
            return []
        found.advance([task.following(answers[id_]) for task, id_ in zip(tasks, ids, strict=True)])
    if first is None or not found.finished:
        raise RuntimeError("a beam search found no token that may follow")
    # With few tokens to choose from there can be fewer beams than asked for; then the last comes again.
    best = [*found.finished, *[found.finished[-1]] * len(outputs)]
    stops = set(template.stop_token_ids)
    return [
        (
            SequenceOutput(
                id_,
                beam.tokens,
                finish=FinishReason.STOP if beam.tokens[-1] in stops else FinishReason.LENGTH,
                started=first.started,
                cached_tokens=first.cached_tokens,
            ),
            when,
        )
        for id_, beam in zip(outputs, best, strict=False)
    ]


class _Step:
    """The next token of one beam.

    Args:
        template: see ``search``.
        beam: so far.
        banned: see ``search``.
        begun: the tokens before the output.
    """

    def __init__(self, template: Submit, beam: Beam, banned: Sequence[int], begun: array[int]) -> None:
        self._template, self._tokens = template, beam.tokens
        position = len(beam.tokens)
        before = begun + array(TYPE, beam.tokens)
        self._banned = {*banned, *repeating(before, template.sampling.no_repeat_ngram)}
        if position < template.min_tokens:
            self._banned.update(template.stop_token_ids)
        self._forced = template.forced[position] if position < len(template.forced) else None
        if template.forced_end is not None and position == template.max_tokens - 1:
            self._forced = template.forced_end

    def submit(self, id_: int, wanted: int) -> Submit:
        """The sequence that asks for it, with so many tokens that may follow."""
        template, tokens = self._template, self._tokens
        return Submit(
            id=id_,
            prompt=template.prompt if template.start else [*template.prompt, *tokens],
            start=[*template.start, *tokens] if template.start else [],
            sampling=Sampling(temperature=0.0),
            max_tokens=1,
            logprobs=wanted,
            unlisted=sorted(self._banned),
            priority=template.priority,
            salt=template.salt,
        )

    def following(self, output: SequenceOutput) -> dict[int, float]:
        """Log probabilities of the tokens that may follow.

        Raises:
            RuntimeError: the engine could not compute them.
        """
        if output.finish is FinishReason.FAILED or not output.logprobs:
            raise RuntimeError(f"the engine could not compute sequence {output.id}; its log says more")
        (position,) = output.logprobs
        logprobs = {one.token: one.logprob for one in (*position.top, position.chosen)}
        return best_of(logprobs, self._banned, self._forced)
