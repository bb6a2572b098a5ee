"""The engine of an encoder without its process: texts in, results out, one flattened forward per step.

An encoder computes a text once and keeps nothing of it, so here are no scheduler of tokens and no pages: a
queue, and steps of as many waiting texts as fit a budget of tokens.
"""

from __future__ import annotations

import heapq
import logging
import time

import torch

from server.encoder_messages import Encode, Pooling, Task
from server.engine.hardware import MemoryMeter
from server.engine.team import Team
from server.messages import FinishReason, SequenceOutput, Stats, StepOutput
from server.models.encoders.encoder import Encoder
from server.models.encoders.head import Chances, Head

log = logging.getLogger("longspan.engine")

# Each has as many logits as the model knows tokens, 256,000 in some.
_MASKS_AT_ONCE = 64


class EncoderCore:
    """Computes texts in the order of their turns, so that a request of many does not keep out one of few.

    A text's turn is its index in its request, counted from the turn that was last when the request came. Each
    step moves that by one at least: if it stayed while requests of one text fill the steps, all of these
    would come before the later texts of a longer request.

    Args:
        encoder: the model.
        head: makes logits of labels or of tokens, if it has one.
        chances: makes probabilities of labels' logits; ``None`` where they have none.
        context_length: most tokens of a text.
        max_running: texts of a step, at most.
        max_batch_tokens: tokens of a step, at most, unless a single text has more.
        team: the threads that compute, where their number follows what the machine gives.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        head: Head | None = None,
        chances: Chances | None = None,
        context_length: int,
        max_running: int,
        max_batch_tokens: int,
        team: Team | None = None,
    ) -> None:
        self._encoder = encoder
        self._head = head
        self._chances = chances
        self._context_length = context_length
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._team = team
        self._memory = MemoryMeter(encoder.device)
        self._queue: list[tuple[int, int]] = []  # turn and id
        self._waiting: dict[int, Encode] = {}
        self._turn = 0

    def submit(self, request: Encode) -> None:
        """Queues a text.

        Raises:
            ValueError: it has no tokens or too many, or some that the model does not know, which would end
                the step of other texts with it.
        """
        if not 0 < len(request.tokens) <= self._context_length:
            raise ValueError(
                f"a text of {len(request.tokens)} tokens does not fit a context of {self._context_length}"
            )
        for what, ids, known in (
            ("token", request.tokens, self._encoder.vocabulary_size),
            ("token type", request.types, self._encoder.token_types),
        ):
            if ids and max(ids) >= known:
                raise ValueError(f"the model has no {what} {max(ids)}: it knows {known}")
        self._waiting[request.id] = request
        heapq.heappush(self._queue, (self._turn + request.turn, request.id))

    def abort(self, text_id: int) -> None:
        """Forgets a text; unknown ids are ignored."""
        self._waiting.pop(text_id, None)

    @property
    def has_work(self) -> bool:
        """Whether some text is not computed."""
        return bool(self._waiting)

    def step(self) -> StepOutput:
        """Computes one batch and returns its results."""
        began = time.monotonic()
        before = self._turn
        batch = self._take()
        self._turn = max(self._turn, before + 1)
        if self._team is None:
            results = self._compute(batch)
        else:
            results = self._team.compute(lambda: self._compute(batch))
        ended = time.monotonic()
        for result in results:
            result.started = began
        tokens = sum(len(request.tokens) for request in batch)
        return StepOutput(ended, results, self.stats(len(batch), tokens, ended - began))

    def _take(self) -> list[Encode]:
        """The next texts, by length, so that those of one length are neighbors."""
        batch: list[Encode] = []
        room = self._max_batch_tokens
        while self._queue and len(batch) < self._max_running:
            turn, text_id = self._queue[0]
            request = self._waiting.get(text_id)
            if request is not None and batch and len(request.tokens) > room:
                break
            heapq.heappop(self._queue)
            if request is None:
                continue  # it was aborted
            del self._waiting[text_id]
            self._turn = turn
            room -= len(request.tokens)
            batch.append(request)
        return sorted(batch, key=lambda request: len(request.tokens))

    def _compute(self, batch: list[Encode]) -> list[SequenceOutput]:
        """Results of all texts; one that can't be computed fails, and those beside it don't."""
        try:
            return self._results(batch)
        except torch.AcceleratorError:  # the device, which fails whatever comes next
            raise
        except Exception as error:
            if len(batch) == 1:
                (request,) = batch
                log.exception("text %d of %d tokens fails", request.id, len(request.tokens))
                return [SequenceOutput(request.id, [], finish=FinishReason.FAILED)]
            log.warning(
                "%d texts together fail (%s); each is computed alone", len(batch), type(error).__name__
            )
        # Out of the handler, whose traceback holds the batch's tensors.
        return [result for request in batch for result in self._compute([request])]

    def _results(self, batch: list[Encode]) -> list[SequenceOutput]:
        hidden = self._encoder.hidden(
            [request.tokens for request in batch], [request.types for request in batch]
        )
        tokens, values = zip(*map(self._values, batch, hidden), strict=True)
        flat = [own.flatten() for own in values]
        # One copy, for which a GPU is waited for once a step.
        copied = torch.cat(flat).cpu().split([len(own) for own in flat])
        return list(map(self._result, batch, tokens, copied))

    def _values(self, request: Encode, hidden: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Tokens, where those are asked for, and the numbers of a text's result."""
        if request.task is Task.SCORE:
            return [], self._scores(hidden)
        if request.task is Task.FILL:
            return self._fills(request, hidden)
        return [], embedding(hidden, request.pooling, normalize=request.normalize)

    def _result(self, request: Encode, tokens: list[int], values: torch.Tensor) -> SequenceOutput:
        if not values.isfinite().all():
            log.error("text %d of %d tokens fails: its vector is not finite", request.id, len(request.tokens))
            return SequenceOutput(request.id, [], finish=FinishReason.FAILED)
        return SequenceOutput(request.id, tokens, finish=FinishReason.STOP, values=values.numpy().tobytes())

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the labels, then their probabilities if these mean any: ``[1 or 2, labels]``."""
        assert self._head is not None  # the server process asks for no task that the model lacks
        logits = self._head.logits(hidden)
        return torch.stack([logits] if self._chances is None else [logits, self._chances(logits)])

    def _fills(self, request: Encode, hidden: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """The most likely tokens, mask by mask, and their log probabilities ``[masks, top_k]``."""
        assert self._head is not None
        places = [place for place, token in enumerate(request.tokens) if token == request.mask_token]
        logprobs, tokens = [], []
        for rows in hidden[places].split(_MASKS_AT_ONCE):
            top = torch.log_softmax(self._head.logits(rows), -1).topk(request.top_k)
            logprobs.append(top.values)
            tokens += top.indices.flatten().tolist()
        return tokens, torch.cat(logprobs)

    def stats(self, computed: int = 0, tokens: int = 0, seconds: float = 0.0) -> Stats:
        """The load now, with the figures of the step that led to it."""
        return Stats(
            running=computed if self._waiting else 0,
            waiting=len(self._waiting),
            prompt_tokens=tokens,
            step_seconds=seconds,
            memory_used=self._memory.used(time.monotonic()),
            threads=torch.get_num_threads(),
        )


@torch.inference_mode()
def embedding(hidden: torch.Tensor, pooling: Pooling, *, normalize: bool) -> torch.Tensor:
    """One vector ``[1, size]`` of a text, or one for each of its tokens, in float32.

    Args:
        hidden: ``[tokens, size]``.
        pooling: how.
        normalize: give them length 1.
    """
    rows = {
        Pooling.MEAN: lambda: hidden.float().mean(0, keepdim=True),
        Pooling.CLS: lambda: hidden[:1].float(),
        Pooling.LAST: lambda: hidden[-1:].float(),
        Pooling.NONE: hidden.float,
    }[pooling]()
    return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows
