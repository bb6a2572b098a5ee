"""The messages between the server process and the engine process.

Everything here crosses the link as msgpack, so it holds plain numbers, strings and lists only. This module
imports neither torch nor transformers: the server process must stay light.
"""

from __future__ import annotations

import enum

import msgspec

from server.encoder_messages import Encode, EncoderDecoderInfo, EncoderInfo, Task
from server.kv_messages import Event
from server.submit import Beams as Beams
from server.submit import Sampling as Sampling
from server.submit import StopTexts as StopTexts
from server.submit import Submit as Submit


class FinishReason(enum.StrEnum):
    """Why a sequence ended; ``FAILED``: it could not be computed, or its logits were NaN."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Forget these sequences and free their pages; those unknown are ignored. No output of them follows."""

    ids: list[int]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """End the engine process."""


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's log probability before penalties and temperature; ``rank`` 1 is the most likely."""

    token: int
    logprob: float
    rank: int


class PositionLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A position's own token and the most likely ones, best first."""

    chosen: Logprob
    top: list[Logprob]


class SequenceOutput(msgspec.Struct, array_like=True):
    """The output of one step for one sequence.

    Attributes:
        id: the sequence.
        tokens: new tokens, in order; of a text with masks for an encoder the most likely ones for each.
        logprobs: one per new token, where asked for.
        prompt_logprobs: once, with the first token, where asked for: one per prompt token but the first.
        finish: set when the sequence has ended; its pages are free by then.
        started: set in the first output only: monotonic time at which the engine first worked on it.
        cached_tokens: set in the first output only: prompt tokens found in the prefix cache.
        preemptions: how often it has given up its pages so far.
        values: of a text for an encoder, with ``finish``: float32, row by row; of masks log probabilities.
        draft_tokens: tokens that were drafted for the step.
        accepted_draft_tokens: those of them that are among ``tokens``.
        searched_tokens: that a beam search computed in the step; those of its outputs are among them.
    """

    id: int
    tokens: list[int]
    logprobs: list[PositionLogprob] | None = None
    prompt_logprobs: list[PositionLogprob] | None = None
    finish: FinishReason | None = None
    started: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    values: bytes = b""
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    searched_tokens: int = 0


class Stats(msgspec.Struct, array_like=True):
    """The engine's load after a step. Totals count since the engine started.

    Attributes:
        running: sequences that hold pages.
        waiting: sequences that hold none; of a beam search that waits, all of its beams.
        pages_total: pages that can be allocated.
        pages_used: pages held by running sequences.
        pages_cached: pages that only the prefix cache holds.
        preemptions: total.
        prefix_queries: total of prompt tokens looked up in the prefix cache.
        prefix_hits: total of those found.
        draft_tokens: total of tokens drafted for steps to verify.
        accepted_draft_tokens: total of those that were output.
        prompt_tokens: tokens of prompts computed in this step.
        decode_tokens: tokens computed in this step that were output before, and drafted ones.
        step_seconds: how long this step took.
        pages_read: total of pages that attention read, over steps, layers and sequences.
        pages_skipped: total of pages that it need not read, thanks to its pattern.
        bytes_moved: to and from the device's memory in this step, at least; see ``server.engine.costs``.
        flops: multiplications and additions of this step.
        memory_used: bytes of the device's memory that are in use.
        threads: CPU threads that computed this step.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    step_seconds: float = 0.0
    pages_read: int = 0
    pages_skipped: int = 0
    bytes_moved: int = 0
    flops: int = 0
    memory_used: int = 0
    threads: int = 0


class StepOutput(msgspec.Struct, array_like=True, tag="step"):
    """The one message of a step: output of all sequences, and the load.

    Attributes:
        time: monotonic time at which the step ended; one clock for all processes of the machine.
        kv_events: which pages have become findable since the step before, and which no longer are, where the
            server process is to know.
    """

    time: float
    sequences: list[SequenceOutput]
    stats: Stats
    kv_events: list[Event] = []


class Loading(msgspec.Struct, array_like=True, tag="loading"):
    """Progress of the engine's start, for people: the stage, and how much of it is done (0 to 1)."""

    stage: str
    fraction: float


class Measured(msgspec.Struct, array_like=True):
    """The device's bandwidth and matrix rate.

    Attributes:
        bandwidth: bytes read from its memory per second.
        matrix_rate: operations of a matrix product per second, two to a multiply-add.
    """

    bandwidth: float
    matrix_rate: float


class Speculation(msgspec.Struct, array_like=True):
    """How tokens are drafted.

    Attributes:
        method: ``ngram``, ``self`` or ``draft``.
        draft_tokens: drafted for a sequence in a step, at most.
        attention_backend: of the drafts, for ``self``.
        attention_options: its options in force.
        draft_model: for ``draft``, where the model that drafts came from.
    """

    method: str
    draft_tokens: int
    attention_backend: str
    attention_options: dict[str, str]
    draft_model: str = ""


class Ready(msgspec.Struct, array_like=True, tag="ready", kw_only=True):
    """The engine is ready; the model and its attention as they run, not as they were asked for.

    An encoder, which has no KV cache, leaves out the fields of it.

    Attributes:
        architecture: the model's class in transformers.
        parameters: number of weights, tied ones counted once.
        layers: attention layers.
        vocabulary_size: number of logits.
        context_length: most tokens of prompt and output together.
        dtype: dtype of computation.
        kv_dtype: dtype of the KV cache.
        weights: form of the linear layers' weights inside the decoder, like ``int4`` or ``float32``.
        device: ``cpu``, or the accelerator's name.
        attention_backend: as the operator named it.
        attention_pattern: which cached tokens a query sees.
        attention_kernel: the kernel that computes it.
        attention_reason: why this kernel.
        attention_options: the options in force.
        page_size: tokens per page.
        kv_memory_share: share of the free memory that the KV cache may take.
        max_batch_tokens: tokens computed per engine step, at most.
        max_running: sequences worked on at once, at most.
        pages_total: pages that can be allocated.
        pages_per_sequence: that a sequence holds at once, at most.
        kv_bytes: bytes of the whole KV cache.
        weight_bytes: bytes of all weights, in the form in which they are kept.
        memory_total: bytes of memory that the device has.
        memory_used: bytes of it in use now.
        measured: bandwidth and matrix rate, if they were asked for and there was memory to measure them.
        threads: CPU threads of the engine.
        executor: what computes steps: ``layer_by_layer``, ``native``, ``cuda_graphs`` or
            ``encoder_decoder``.
        executor_reason: why this executor.
        cuda_graphs: how many batch sizes' decode steps are captured.
        versions: of torch and transformers.
        tasks: what the model can do.
        encoder: of an encoder.
        encoder_decoder: of an encoder-decoder.
        speculation: ``None`` where no tokens are drafted.
    """

    architecture: str
    parameters: int
    layers: int
    vocabulary_size: int
    context_length: int
    dtype: str
    kv_dtype: str = "none"
    weights: str
    device: str
    attention_backend: str
    attention_pattern: str
    attention_kernel: str
    attention_reason: str
    attention_options: dict[str, str] = {}
    page_size: int = 0
    kv_memory_share: float = 0.0
    max_batch_tokens: int
    max_running: int
    pages_total: int = 0
    pages_per_sequence: int = 0
    kv_bytes: int = 0
    weight_bytes: int
    memory_total: int
    memory_used: int
    measured: Measured | None = None
    threads: int
    executor: str
    executor_reason: str
    cuda_graphs: int = 0
    versions: dict[str, str]
    tasks: tuple[Task, ...] = (Task.GENERATE,)
    encoder: EncoderInfo | None = None
    encoder_decoder: EncoderDecoderInfo | None = None
    speculation: Speculation | None = None

    @property
    def longest_text(self) -> int:
        """Tokens of a text to encode or of a prompt, at most: a token of output needs room beside that."""
        if self.encoder is not None:
            return self.context_length
        source = self.encoder_decoder
        return self.context_length - 1 if source is None else source.source_length


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """The engine can't start or go on; the sentence says what to do. The process ends after it."""

    message: str


class Launch(msgspec.Struct):
    """The first message of the server process to a new engine.

    Attributes:
        folder: the model, a Hugging Face folder.
        settings: ``Settings`` as JSON text, complete.
        tokenizer: the folder of its tokenizer; ``None`` if it has none.
    """

    folder: str
    settings: str
    tokenizer: str | None = None


ToEngine = Submit | Encode | Abort | Shutdown
FromEngine = Loading | Ready | StepOutput | Failed
