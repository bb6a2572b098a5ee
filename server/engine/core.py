"""The engine without its process: sequences in, news out, one step at a time."""

from __future__ import annotations

import logging
import time

from attention.patterns.base import ContentPattern
from server.engine.costs import Cost, StepCosts
from server.engine.hardware import MemoryMeter
from server.engine.kv_manager import KVManager, most_pages
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler, Work
from server.engine.sequence import Sequence
from server.engine.types import FinishReason, PositionLogprob, SequenceNews, Stats, StepNews, Submit

log = logging.getLogger("longspan.engine")

_NOTHING = Cost(0, 0)


class EngineCore:
    """Runs sequences to their ends: schedule, run, sample, tell.

    Args:
        runner: the model over its paged cache.
        context_length: most tokens of a sequence.
        max_running: sequences that run at once, at most.
        max_batch_tokens: tokens of a step, at most.
        prefix_cache: share the pages of equal prompts.
        check_integrity: check the allocator's books after every step.

    Attributes:
        costs: what its steps cost at least.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context_length: int,
        max_running: int,
        max_batch_tokens: int,
        prefix_cache: bool = True,
        check_integrity: bool = False,
    ) -> None:
        self.runner = runner
        self.context_length = context_length
        self.check_integrity = check_integrity
        expired = runner.attention.expired
        cache = runner.cache
        pattern = runner.attention.pattern
        self.kv = KVManager(
            cache.pages,
            cache.page_size,
            prefix_cache=prefix_cache,
            expired=expired,
            prompts_only=isinstance(pattern, ContentPattern) and pattern.decoded_keys_differ,
            salt=None if runner.rope is None else runner.rope.salt,
        )
        needed = most_pages(context_length, max_batch_tokens, cache.page_size, expired)
        if needed > self.kv.pool.total:
            raise ValueError(f"a context of {context_length} takes {needed} pages of {self.kv.pool.total}")
        self._pages_read = self._pages_skipped = 0
        self._memory = MemoryMeter(runner.device)
        self.costs = StepCosts(runner.model, list(runner.layers.values()), cache)
        self.scheduler = Scheduler(self.kv, max_running, max_batch_tokens)

    def submit(self, request: Submit) -> None:
        """Queues a sequence.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context.
        """
        if not 0 < len(request.prompt) < self.context_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens does not fit a context of {self.context_length}"
            )
        self.scheduler.add(request)

    def abort(self, sequence_id: int) -> None:
        """Forgets a sequence and frees its pages at once; unknown ids are ignored."""
        self.scheduler.remove(sequence_id)

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> StepNews:
        """Computes one batch and reports what it brought.

        Raises:
            server.engine.page_pool.IntegrityError: the books are wrong, where they are checked.
        """
        began = time.monotonic()
        works = self.scheduler.schedule()
        fresh = [work.sequence for work in works if work.sequence.started is None]
        for sequence in fresh:
            sequence.started = began
        prompt_tokens = sum(
            min(tokens, max(0, sequence.prompt_len - sequence.computed)) for sequence, tokens in works
        )
        computed = sum(tokens for _, tokens in works)
        news, cost = self._run(works, set(fresh)) if works else ([], _NOTHING)
        if self.check_integrity:
            self.scheduler.check_integrity()
        ended = time.monotonic()
        return StepNews(ended, news, self.stats(prompt_tokens, computed - prompt_tokens, ended - began, cost))

    def _run(self, works: list[Work], fresh: set[Sequence]) -> tuple[list[SequenceNews], Cost]:
        output = self.runner.run(works)
        self._pages_read += output.pages.read
        self._pages_skipped += output.pages.skipped
        rows = len(output.sequences) + sum(map(len, output.prompt_logprobs))
        cost = self.costs.of(sum(tokens for _, tokens in works), rows, output.pages.by_layer)
        for (sequence, tokens), prompt_logprobs in zip(works, output.prompt_logprobs, strict=True):
            sequence.prompt_logprobs.extend(prompt_logprobs)
            self.kv.advance(sequence, tokens)
        sampled = {
            sequence: (token, logprob)
            for sequence, token, logprob in zip(output.sequences, output.tokens, output.logprobs, strict=True)
        }
        news = []
        for sequence, _ in works:
            if sequence in sampled:
                news.append(self._accept(sequence, *sampled[sequence]))
            elif sequence in fresh:
                news.append(SequenceNews(sequence.id, []))
            else:
                continue
            if sequence in fresh:
                news[-1].started = sequence.started
                news[-1].cached_tokens = sequence.cached_tokens
        return news, cost

    def _accept(self, sequence: Sequence, token: int | None, logprob: PositionLogprob | None) -> SequenceNews:
        if token is None:
            log.error(
                "sequence %d fails at token %d: the model's logits are no numbers%s",
                sequence.id,
                sequence.total,
                self.runner.narrowness,
            )
            self.scheduler.remove(sequence.id)
            return SequenceNews(sequence.id, [], finish=FinishReason.FAILED)
        first = sequence.output_len == 0
        sequence.tokens.append(token)
        finish = sequence.finish_reason(token, self.context_length)
        if finish is not None:
            self.scheduler.remove(sequence.id)
        elif self.runner.rope is not None and self.runner.rope.stale(sequence.total):
            self.scheduler.restart(sequence)
        return SequenceNews(
            sequence.id,
            [token],
            logprobs=None if logprob is None else [logprob],
            prompt_logprobs=sequence.prompt_logprobs
            if first and sequence.request.prompt_logprobs is not None
            else None,
            finish=finish,
            preemptions=sequence.preemptions,
        )

    def stats(
        self, prompt_tokens: int = 0, decode_tokens: int = 0, seconds: float = 0.0, cost: Cost = _NOTHING
    ) -> Stats:
        """The load now, with the figures of the step that led to it."""
        pool = self.kv.pool
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages_total=pool.total,
            pages_used=pool.held,
            pages_cached=pool.cached,
            preemptions=self.scheduler.preemptions,
            prefix_queries=self.kv.prefix_queries,
            prefix_hits=self.kv.prefix_hits,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            step_seconds=seconds,
            pages_read=self._pages_read,
            pages_skipped=self._pages_skipped,
            bytes_moved=cost.bytes,
            flops=cost.flops,
            memory_used=self._memory.used(time.monotonic()),
        )
