"""The engine called directly, without server process, link and gRPC.

The rest of the load test knows only the public API. This package is the exception, for two things that the
API cannot give: what a step costs at a context that would take hours to compute, and what of a served figure
is the engine's own.

A long context is not computed but *placed*: a sequence gets its pages from the KV manager, step by step as if
it were computed, so that pages are evicted as the pattern says, and the pages that remain are copies
of pages that the model itself made of a short prompt, summaries included. From there on everything is real:
the scheduler admits the sequence, and every timed step is ``EngineCore.step``.
"""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from loadtest.direct.room import check_room, placed_tokens
from loadtest.direct.template import Template
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.prepare import chosen_device
from server.engine.sequence import Sequence
from server.messages import FinishReason, Ready, Sampling, Stats, StepOutput, Submit
from server.settings import Settings
from server.sizes import Sizes

_GREEDY = Sampling(temperature=0.0)
_TEMPLATE_TOKENS = 512
_WARMUP_STEPS = 1


@dataclass(frozen=True, slots=True)
class Run:
    """Real sequences from an empty cache to their ends.

    Attributes:
        seconds: from the first step's begin to the last one's end.
        output_tokens: of all sequences together.
        outputs: the tokens of each, in the order of the prompts.
    """

    seconds: float
    output_tokens: int
    outputs: list[list[int]]


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode steps of sequences that were placed.

    Attributes:
        seconds: of each timed step.
        pages_read: by the first of them, summed over layers and sequences.
        pages_held: by all sequences after it.
    """

    seconds: list[float]
    pages_read: int
    pages_held: int


def open_engine(settings: Settings, folder: Path) -> DirectEngine:
    """An engine in this process, as ``longspan serve`` would build it, but without a prefix cache.

    Args:
        settings: as the server takes them; ``prefix_cache`` counts as off, since placed pages hold other keys
            and values than their tokens give, and so does ``speculate``.
        folder: the model, a Hugging Face folder.

    Raises:
        server.errors.RefusedError: the model, the settings and the machine don't go together.
    """
    # A step has exactly the given size: no smaller chunk, no thread fewer after a slow step, and no drafts.
    running = Sizes.of(settings, chosen_device(settings)).max_running
    fixed = {
        "prefix_cache": False,
        "prompt_step_ms": 0.0,
        "max_prefills": running,
        "speculate": "off",
    }
    core, ready = build_engine(settings.model_copy(update=fixed), folder, lambda stage, fraction: None)
    core.team = None
    gc.collect()
    gc.freeze()  # as the engine process does
    return DirectEngine(core, ready)


class DirectEngine:
    """Times an engine's steps. Not for several threads.

    Args:
        core: the engine, without sequences and prefix cache.
        ready: what it says of itself.

    Attributes:
        core: the engine.
        ready: what it says of itself.
    """

    def __init__(self, core: EngineCore, ready: Ready) -> None:
        if core.kv.prefix_cache:
            raise ValueError("placed pages would be found by real prompts; turn the prefix cache off")
        self.core, self.ready = core, ready
        self._next_id = 1
        self._template: Template | None = None

    def close(self) -> None:
        """Gives model and cache back; no method may be called after it."""
        on_cuda = self.core.runner.device.type == "cuda"
        del self.core
        self._template = None
        gc.unfreeze()
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()

    def decode(self, context: int, streams: int, steps: int, seed: int = 0) -> Decode:
        """Times decode steps, after a few that don't count.

        Args:
            context: tokens in the cache before the first timed step, of each sequence; at least 1.
            streams: sequences that run at once.
            steps: to time, at least 1.
            seed: of the tokens and of which pages are copied.

        Raises:
            RoomError: so many sequences of this length don't fit.
        """
        # The prompt's last token is computed first, which gives the first token to decode.
        warmup = min(_WARMUP_STEPS, context - 1)
        prompt = context - warmup
        rng = random.Random(seed)
        prompts = [self._random(prompt, rng) for _ in range(streams)]
        sequences = self._place(prompts, prompt - 1, placed_tokens(context, steps) - prompt, rng)
        try:
            before = self._step_of(streams, 0)
            for _ in range(warmup):
                before = self._step_of(0, streams)
            seconds, stats = [], []
            for _ in range(steps):
                began = time.perf_counter()
                stats.append(self._step_of(0, streams))
                seconds.append(time.perf_counter() - began)
        finally:
            self._abort(sequences)
        first = stats[0]
        return Decode(seconds, first.pages_read - before.pages_read, first.pages_used)

    def prefill_times(self, context: int, tokens: int, repeats: int) -> list[float]:
        """Seconds in which ``tokens`` tokens of a prompt are computed, once for each of ``repeats``.

        They take as many steps as ``max_batch_tokens`` makes of them. One repeat more comes first, which does
        not count.

        Args:
            context: tokens of the prompt that are in the cache before; may be 0.
            tokens: to compute, at least 1.
            repeats: of the whole.

        Raises:
            RoomError: they don't fit.
        """
        times = []
        for seed in range(repeats + 1):
            rng = random.Random(seed)
            sequences = self._place([self._random(context + tokens, rng)], context, 1, rng)
            try:
                times.append(self._prefill(tokens))
            finally:
                self._abort(sequences)
        return times[1:]

    def generate(self, prompts: list[list[int]], output_tokens: int) -> Run:
        """Real runs from an empty cache: all prompts at once, greedy, with no token that ends them.

        Args:
            prompts: token ids.
            output_tokens: of each sequence.

        Raises:
            RoomError: they don't all fit at once.
        """
        check_room(self.core, self.ready, [len(prompt) + output_tokens for prompt in prompts])
        requests = [self._request(prompt, output_tokens) for prompt in prompts]
        outputs: dict[int, list[int]] = {request.id: [] for request in requests}
        began = time.perf_counter()
        for request in requests:
            self.core.submit(request)
        while self.core.has_work:
            for item in self._step().sequences:
                outputs[item.id] += item.tokens
        return Run(
            seconds=time.perf_counter() - began,
            output_tokens=sum(map(len, outputs.values())),
            outputs=list(outputs.values()),
        )

    def _step_of(self, prompt_tokens: int, decode_tokens: int) -> Stats:
        """A step that does this and nothing else."""
        stats = self._step().stats
        done = (stats.prompt_tokens, stats.decode_tokens, stats.running)
        if done != (prompt_tokens, decode_tokens, prompt_tokens + decode_tokens):
            raise RuntimeError(
                f"a step that had {prompt_tokens} sequences to begin and {decode_tokens} to go on with "
                f"computed {done[0]} tokens of prompts and {done[1]} others, and {done[2]} sequences are left"
            )
        return stats

    def _prefill(self, tokens: int) -> float:
        """All steps until nothing is left to do; their seconds."""
        computed = 0
        began = time.perf_counter()
        while self.core.has_work:
            computed += self._step().stats.prompt_tokens
        seconds = time.perf_counter() - began
        if computed != tokens:
            raise RuntimeError(f"{computed} tokens of a prompt were computed instead of {tokens}")
        return seconds

    def _step(self) -> StepOutput:
        output = self.core.step()
        if any(item.finish is FinishReason.FAILED for item in output.sequences):
            raise RuntimeError("the model's logits were NaN")
        return output

    def _place(
        self, prompts: list[list[int]], computed: int, output_tokens: int, rng: random.Random
    ) -> list[Sequence]:
        """Submits sequences whose first ``computed`` tokens have keys and values in the cache already."""
        check_room(self.core, self.ready, [len(prompt) + output_tokens for prompt in prompts])
        core = self.core
        self._template = self._template or self._make_template()
        sequences = []
        for prompt in prompts:
            core.submit(self._request(prompt, output_tokens))
            *_, sequence = core.scheduler.waiting
            sequences.append(sequence)
            while sequence.computed < computed:
                count = min(core.scheduler.max_batch_tokens, computed - sequence.computed)
                if not core.kv.extend(sequence, count):
                    raise RuntimeError("pages are short although there was room")
                core.kv.advance(sequence, count)
            self._template.fill(sequence.pages, rng)
        return sequences

    def _make_template(self) -> Template:
        core, size = self.core, self.core.kv.page_size
        longest = min(_TEMPLATE_TOKENS, core.context_length - 1, core.kv.pool.total * size)
        tokens = longest // size * size or longest  # whole pages, if there is one
        return Template(core, self._request(self._random(tokens, random.Random(0)), 1))

    def _request(self, prompt: list[int], output_tokens: int) -> Submit:
        self._next_id += 1
        return Submit(id=self._next_id, prompt=prompt, sampling=_GREEDY, max_tokens=output_tokens)

    def _random(self, count: int, rng: random.Random) -> list[int]:
        """Token ids; the first ones of a vocabulary, which often have a special meaning, are left out."""
        vocabulary = self.ready.vocabulary_size
        return rng.choices(range(min(1000, vocabulary // 2), vocabulary), k=count)

    def _abort(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.core.abort(sequence.id)
