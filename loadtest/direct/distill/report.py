"""The results of a distillation: a drawing of the loss, and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.direct.distill.acceptance import best_speedup
from loadtest.direct.distill.types import Acceptance, Distillation, Point
from loadtest.report.chart import Chart
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import look
from loadtest.report.scale import Axis, from_zero, span
from loadtest.report.svg import Size

_WORTH = 1.05  # a smaller factor is not worth a second model


def drawing_of_loss(losses: Sequence[Point]) -> Drawing:
    """The loss by step, of the training's text and of held-out text."""
    lines = {
        name: [(float(point.step), point.loss) for point in losses if point.held_out is held_out]
        for name, held_out in (("training", False), ("held out", True))
    }

    def draw(size: Size) -> Chart:
        low, high = span([point.loss for point in losses])
        chart = Chart(size, from_zero("step", [point.step for point in losses]), Axis("loss", low, high))
        looks = {name: look(number) for number, name in enumerate(lines, start=1)}
        for name, line in lines.items():
            chart.line(line, looks[name])
        chart.names_below(looks.items())
        return chart

    return drawing("loss", "Loss", "Distillation and cross-entropy, nats per token. Lower is better.", draw)


def sentences(found: Distillation) -> list[str]:
    """The sentences for the operator."""
    cost = found.student_weights / found.teacher_weights
    factor, drafted = best_speedup(found.after.greedy, cost)
    told = [
        f"acceptance in {found.after.tokens:,} held-out tokens: {_acceptance(found.before)} before training, "
        f"{_acceptance(found.after)} after",
        f"the student reads {cost:.0%} of the teacher's weights per token: {found.student_weights:,} of "
        f"{found.teacher_weights:,}",
    ]
    if found.after.low <= found.before.high:
        told.append("training has not surely raised acceptance: give more text or more --steps")
    bound = f"at best {factor:.2f} times as fast, drafting {drafted}, if only reading weights took time"
    if factor < _WORTH:
        told.append(
            f"speculation does not pay with this student: it makes greedy decoding {bound}; give fewer "
            "--layers, more text or more --steps"
        )
    else:
        told.append(f"speculation makes greedy decoding {bound}")
    return told


def served_sentences(found: Distillation) -> list[str]:
    """What speculation with the student brings where it is served: the verdict last."""
    if found.unserved:
        return [f"the pair could not be served here, so its speed is not known: {found.unserved}"]
    served = found.served
    if served is None:
        return []
    told = [
        f"served, {served.prompts} held-out prompts of {served.prompt_tokens} tokens, "
        f"{served.output_tokens} tokens of output, greedy, one at a time:"
    ]
    for row in served.rows:
        drafts = ""
        if row.drafted:
            drafts = (
                f"; {row.accepted / row.drafted:.0%} of {row.drafted:,} drafts accepted, "
                f"{row.per_step:.2f} tokens per step"
            )
        elif row is not served.rows[0]:
            drafts = "; nothing was drafted, since by the measured times no draft would have paid"
        told.append(f"  {row.name}: {row.rate:.1f} tokens/s{drafts}")
    if served.different:
        told.append(
            f"  {served.different} of {served.prompts} answers differ by rounding: see docs/speculation.md"
        )
    speed = served.rows[-1].speed
    within = f" ({speed.low:.2f} to {speed.high:.2f})" if speed.claimed else ""
    factor = f"{speed.value:.2f} times as fast{within} as without a draft model"
    if not speed.claimed:
        told.append(f"speculation: {factor}, of too few prompts to tell whether it pays; give more --text")
    elif speed.low > 1:
        told.append(f"speculation pays on this machine: {factor}")
    elif speed.high < 1:
        told.append(f"speculation does not pay on this machine: {factor}; serve the teacher alone")
    else:
        told.append(f"speculation does not surely pay on this machine: {factor}")
    return told


def _acceptance(found: Acceptance) -> str:
    return f"{found.sampled:.3f} ({found.low:.3f} to {found.high:.3f}; greedy {found.greedy:.3f})"
