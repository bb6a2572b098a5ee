"""Evaluates the quality of all candidates of a comparison, unit by unit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from loadtest.compare.types import Comparison
from loadtest.compare.units import Rows, Unit, lacking, order
from loadtest.evaluation import text as texts
from loadtest.evaluation.agreement import agreeing
from loadtest.evaluation.ask import Asked, ask, prepare
from loadtest.evaluation.divergence import blocks_against
from loadtest.evaluation.documents import read_all
from loadtest.evaluation.memory import memory
from loadtest.evaluation.pairs import OWN
from loadtest.evaluation.prompts import plain, special_before
from loadtest.evaluation.text import Decoded, Slice, decode_slice
from loadtest.measuring.requests import reason
from loadtest.tasks.registry import make
from loadtest.tasks.types import Sample
from longspan import Client, DeadlineError, LongspanError, UnavailableError

TOP = 20
"""Most likely tokens that are requested at each place of the text."""

TURNS = 12
"""Questions about one context, where a task has so many. More would cost less than another context, but they
depend on one another: as many questions about more contexts tell more."""

_SLICES = 64  # of the text that are used, at the longest context
_CHARACTERS = 4.0  # of a token, about
_PIECE = 100_000  # characters
FIRST_RATE = 300.0
"""Tokens per second and candidate, until one is known."""


class Evaluator:
    """Evaluates every candidate on the same questions and the same text.

    Args:
        comparison: with its plan; units that it has already are left out.
        client: of a server of the model, whose tokenizer sizes what is asked.
        text: that is decoded.
        prose: running text in which the tasks hide what they ask for.
        own: the user's own questions.
        turns: questions about one context, at most.
        contexts: of each task and length, at most; ``None`` for as many as time allows.
        rate: tokens per second of one candidate, as far as that is known before any unit.
        address: host and port of full attention's server, through which readings read.

    Raises:
        ValueError: the text is too short for a context, or a context for a task; says what to do.
        longspan.LongspanError: the server does not answer.
    """

    def __init__(
        self,
        comparison: Comparison,
        client: Client,
        *,
        text: str,
        prose: str,
        own: Sequence[Sample] = (),
        turns: int = TURNS,
        contexts: int | None = None,
        rate: float = FIRST_RATE,
        address: tuple[str, int] = ("", 0),
    ) -> None:
        self._address = address
        self._comparison = comparison
        self._plan = comparison.plan
        self._client = client
        self._prose = prose
        self._own = own
        self._turns = turns
        self._contexts = contexts
        self._rate = rate
        self._reserve = _reserve(client, chat=self._plan.chat)
        tokens = texts.tokens(client, text, _SLICES * max(self._plan.contexts))
        self._slices = {
            length: texts.slices(tokens, length, self._plan.seed) for length in self._plan.contexts
        }
        self._seconds: dict[tuple[str, int, str], list[float]] = {}
        self._rates: list[float] = []
        self._read_rates: list[float] = []
        # Refuses a text or context that is too short now, not after an hour.
        self._first = {
            unit: self._make(unit) for unit in self._order(1) if unit.kind == "answers" and unit.task != OWN
        }

    def units(self) -> Iterator[Unit]:
        """Units left to do, in order; without end unless ``contexts`` was given."""
        for unit in self._order(self._contexts):
            if self._lacking(unit):
                yield unit

    def run(self, unit: Unit, clients: Mapping[str, Client], end: float = math.inf) -> Rows:
        """Does a unit on every candidate that lacks it, full attention first.

        A comparison with full attention token by token needs full's own again, which no row keeps.

        Args:
            unit: of ``units``.
            clients: of the servers that run, by the candidate's name; those that failed are left out.
            end: monotonic time after which no candidate's turn begins; units cut off by it stay to be done.

        Returns:
            The rows, to be added with ``add_to``. A candidate whose server has ended has none, but is among
            ``failed``; if that is full attention, there are no rows at all.

        Raises:
            ValueError: full attention is not among the clients.
        """
        full = self._plan.full
        if full not in clients:
            raise ValueError(f"nothing can be compared without a server of {full!r}; start one")
        began = time.monotonic()
        rows = Rows()
        names = self.due(unit, clients)
        do = {"answers": self._answer, "text": self._decode, "memory": self._hold}[unit.kind]
        try:
            on = do(unit, rows)
        except (UnavailableError, DeadlineError) as error:  # full's server tokenizes what is asked
            return Rows(failed={full: reason(error)})
        asked = 0
        for name in names:
            if time.monotonic() >= end:
                break
            asked += 1
            turn = time.monotonic()
            try:
                on(name, clients[name])
                if self._plan.candidate(name).is_reading:
                    self._read_rates.append(self._read(unit) / max(time.monotonic() - turn, 1e-3))
            except (UnavailableError, DeadlineError) as error:
                rows.failed[name] = reason(error)
                if name == full:
                    return Rows(failed=rows.failed)
        seconds = (time.monotonic() - began) / max(1, asked)
        self._seconds.setdefault((unit.kind, unit.length, unit.task), []).append(seconds)
        self._rates.append(self._tokens(unit) / max(seconds, 1e-3))
        return rows

    def cost(self, unit: Unit, among: Collection[str] | None = None) -> float:
        """Seconds that a unit will probably take on all candidates that lack it, or on those of ``among``."""
        due = self.due(unit, among)
        known = self._seconds.get((unit.kind, unit.length, unit.task))
        if known:
            return len(due) * fmean(known)
        readings = sum(self._plan.candidate(name).is_reading for name in due)
        rate = fmean(self._rates) if self._rates else self._rate
        seconds = (len(due) - readings) * self._tokens(unit) / rate
        if readings:
            seconds += readings * self._read(unit) / fmean(self._read_rates or [rate])
        return seconds

    def _order(self, contexts: int | None) -> Iterator[Unit]:
        own = tuple(dict.fromkeys(sample.index for sample in self._own))
        plan = self._plan
        return order(plan.contexts, plan.tasks, self._slices, own, contexts, plan.beyond)

    def _answer(self, unit: Unit, rows: Rows) -> Callable[[str, Client], None]:
        samples = self._samples(unit)
        # Beyond the model's context there is no prompt: only readings are asked.
        fits = unit.length not in self._plan.beyond
        prompts = prepare(self._client, samples, chat=self._plan.chat) if fits else []
        first: list[Asked] = []

        def on(name: str, client: Client) -> None:
            candidate = self._plan.candidate(name)
            if candidate.is_reading:
                options = candidate.read_options()
                rows.answers += read_all(self._address, name, options, samples, client.timeout)
                return
            asked = ask(client, name, samples, prompts)
            rows.answers += agreeing(asked, first) if first else [each.answer for each in asked]
            first.extend([] if first else asked)

        return on

    def _decode(self, unit: Unit, rows: Rows) -> Callable[[str, Client], None]:
        part = self._slice(unit)
        first: list[Decoded | LongspanError] = []

        def on(name: str, client: Client) -> None:
            top = min(TOP, client.model_info().limits.logprobs)
            decoded = decode_slice(client, part, top)
            rows.text += blocks_against(name, part, decoded, first or None)
            first.extend([] if first else decoded)

        return on

    def _hold(self, unit: Unit, rows: Rows) -> Callable[[str, Client], None]:
        part = self._slice(unit)  # of the text, since that is in the prefix cache

        def on(name: str, client: Client) -> None:
            rows.memory.append(memory(client, name, part.ids, self._plan.kv_memory))

        return on

    def due(self, unit: Unit, among: Collection[str] | None = None) -> list[str]:
        """Candidates on which a unit is to be done, in the plan's order.

        Args:
            unit: of ``units``.
            among: names of those that are asked about; ``None`` for all.
        """
        full = self._plan.full
        due = self._lacking(unit)
        due = due if among is None else due.intersection(among)
        if due and (unit.kind == "text" or unit.task == OWN):
            due.add(full)
        return [candidate.name for candidate in self._plan.candidates if candidate.name in due]

    def _lacking(self, unit: Unit) -> set[str]:
        return lacking(unit, self._comparison, self._slice(unit) if unit.kind == "text" else None)

    def _slice(self, unit: Unit) -> Slice:
        return self._slices[unit.length][unit.index]

    def _samples(self, unit: Unit) -> list[Sample]:
        if unit.task == OWN:
            return [sample for sample in self._own if sample.index == unit.index]
        return self._first.get(unit) or self._make(unit)

    def _make(self, unit: Unit) -> list[Sample]:
        return make(
            unit.task,
            self._count,
            self._prose,
            unit.length,
            unit.index,
            self._plan.seed,
            self._turns,
            reserve=self._reserve,
        )

    def _read(self, unit: Unit) -> int:
        """Tokens that a reading asks about: each question is asked of every passage."""
        return len(self._first[replace(unit, index=0)]) * unit.length

    def _count(self, text: str) -> int:
        """Tokens of a text, by pieces where it is longer than a server of a short context takes at once."""
        pieces = (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
        return sum(len(plain(self._client, piece)) for piece in pieces)

    def _tokens(self, unit: Unit) -> float:
        """About how many tokens a unit has one candidate compute."""
        if unit.kind == "memory":
            return unit.length
        if unit.kind == "text":
            part = self._slice(unit)
            return unit.length + len(part.starts) * part.block_tokens
        samples = self._samples(unit) if unit.task == OWN else self._first[replace(unit, index=0)]
        asked = max(len(sample.context) for sample in samples) / _CHARACTERS
        return asked + sum(
            len(sample.question + sample.answer_prefix) / _CHARACTERS + sample.max_new_tokens
            for sample in samples
        )


def _reserve(client: Client, *, chat: bool) -> int:
    """Tokens of a prompt that are none of its text's."""
    if not chat:
        return len(special_before(client))
    text = "a"
    return len(client.tokenize([("user", text)]).token_ids) - len(plain(client, text))
