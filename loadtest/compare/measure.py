"""Measures every candidate at every context: one server at a time, and what was measured before is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loadtest.compare.types import Candidate, Cell, Comparison, key
from loadtest.greedy import GREEDY
from loadtest.quality import text as texts
from loadtest.quality.decode_time import decode_times
from loadtest.quality.needle import needles
from loadtest.quality.perplexity import perplexity, pooled
from loadtest.quality.residency import pages_held
from loadtest.quality.types import Deployment
from loadtest.servers import NotStartedError, serve
from longspan import Client, LongspanError

Tell = Callable[[str], None]

# Under a context's own measurement: how a candidate answers the user's prompts does not depend on it.
NO_CONTEXT = 0

_PAGE_TOURS = 40  # output tokens with which a sequence meets every offset in its pages
_WARMUP_TOKENS = 64


class Measurer:
    """Fills a comparison.

    Args:
        comparison: with its plan; cells that it has are not measured again.
        text: what perplexity and needles are measured on.
        tell: told what is being measured.
        keep: called after each measurement, to save what there is.
    """

    def __init__(
        self, comparison: Comparison, text: str, tell: Tell, keep: Callable[[], None] = lambda: None
    ) -> None:
        self._comparison = comparison
        self._plan = comparison.plan
        self._text = text
        self._sentences = texts.sentences(text)
        self._tell = tell
        self._keep = keep

    def run(self) -> None:
        """Measures what is missing. What a server refuses becomes the cell's error."""
        for candidate in self._plan.candidates:
            self._serve(candidate.name, candidate.deployment, self._as_served(candidate))
            if candidate.predicting != candidate.deployment:
                self._serve(candidate.name, candidate.predicting, self._predictions())

    def _as_served(self, candidate: Candidate) -> dict[tuple[int, str], Callable[[Client, int], Cell]]:
        jobs: dict[tuple[int, str], Callable[[Client, int], Cell]] = {}
        for context in self._plan.contexts:
            jobs[context, "speed"] = self._speed
            jobs[context, "memory"] = self._memory
            jobs[context, "needles"] = self._needles
        if self._plan.prompts:
            jobs[NO_CONTEXT, "answers"] = self._answers
        if candidate.predicting == candidate.deployment:
            jobs |= self._predictions()
        return jobs

    def _predictions(self) -> dict[tuple[int, str], Callable[[Client, int], Cell]]:
        return {(context, "perplexity"): self._perplexity for context in self._plan.contexts}

    def _serve(
        self,
        name: str,
        deployment: Deployment,
        jobs: Mapping[tuple[int, str], Callable[[Client, int], Cell]],
    ) -> None:
        """Does the jobs that are still to be done on a server of this deployment."""
        cells = self._comparison.cells
        left = {place: job for place, job in jobs.items() if key(name, *place) not in cells}
        if not left:
            return
        self._tell(f"{name}: starting a server")
        try:
            with (
                serve(*self._plan.arguments, *deployment.arguments) as address,
                Client(address.host, address.port) as client,
            ):
                self._describe(name, client)
                client.generate(_random_ids(client, _WARMUP_TOKENS, 0), max_tokens=4, ignore_eos=True)
                for (context, measurement), job in left.items():
                    self._tell(f"{name}: {measurement}" + (f" at {context}" if context else ""))
                    try:
                        cell: Cell = job(client, context)
                    except (LongspanError, ValueError) as error:
                        cell = {"error": str(error)}
                    cells[key(name, context, measurement)] = cell
                    self._keep()
        except NotStartedError as error:
            for place in left:
                cells.setdefault(key(name, *place), {"error": str(error)})
            self._keep()

    def _describe(self, name: str, client: Client) -> None:
        model, info = client.model_info(), client.server_info()
        comparison = self._comparison
        comparison.versions = {"longspan": info.version, **info.versions}
        comparison.model = {
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "dtype": model.dtype,
            "kv_dtype": model.kv_dtype,
            "device": info.device,
        }
        attention = model.attention
        comparison.kernels[name] = {"kernel": attention.kernel, "reason": attention.reason}

    def _speed(self, client: Client, context: int) -> Cell:
        """Prompts of random tokens, which no prefix cache knows."""
        output = self._plan.output_tokens
        ids = _random_ids(client, context - output, context)
        first = client.generate(ids, max_tokens=1, ignore_eos=True, **GREEDY)
        (time,) = decode_times(client, ids, [len(ids)], output)
        return {
            "prefill_rate": len(ids) / first.timings.prefill_seconds,
            "ttft": first.timings.time_to_first_token_seconds,
            "tpot": time.seconds,
        }

    def _memory(self, client: Client, context: int) -> Cell:
        ids = _random_ids(client, context - _PAGE_TOURS, context)
        held = pages_held(client, ids, _PAGE_TOURS)
        load = client.server_info().load
        return {"kv_bytes": held * load.kv_bytes / (load.pages_total + 1), "fits": load.pages_total // held}

    def _perplexity(self, client: Client, context: int) -> Cell:
        length = context - 1  # one token is generated
        ids = texts.tokens(client, self._text, self._plan.slices * length)
        parts = [
            perplexity(client, ids[start : start + length], length // 4)
            for start in range(0, len(ids), length)
        ]
        return {"perplexity": pooled(parts).value}

    def _needles(self, client: Client, context: int) -> Cell:
        room = 16  # for the answer
        results = needles(
            client, self._sentences, context - room, self._plan.depths, self._plan.keys_per_depth
        )
        return {
            name: {
                str(depth): sum(count(needle) for needle in results if needle.depth == depth)
                for depth in self._plan.depths
            }
            for name, count in (("found", lambda needle: needle.found), ("hidden", lambda needle: 1))
        }

    def _answers(self, client: Client, _context: int) -> Cell:
        """The greedy answers to the user's prompts, as tokens and text."""
        answers: list[dict[str, Any]] = []
        for prompt in self._plan.prompts:
            answer = client.generate(prompt, max_tokens=self._plan.output_tokens, **GREEDY)
            answers.append({"tokens": list(answer.token_ids), "text": answer.text})
        return {"answers": answers}


def same_tokens(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of an answer up to which it is another's, token by token."""
    longest = max(len(ours), len(theirs))
    same = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        same += 1
    return same / longest if longest else 1.0


def _random_ids(client: Client, count: int, seed: int) -> list[int]:
    vocabulary = client.model_info().vocabulary_size
    rng = random.Random(seed)
    return [rng.randrange(min(1000, vocabulary // 2), vocabulary) for _ in range(count)]
