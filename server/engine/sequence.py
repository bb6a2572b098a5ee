"""One sequence in the engine: its tokens, how many of them are computed, and the pages that hold them."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING, Any

from server.messages import FinishReason, PositionLogprob, Submit
from server.models.executors.base import PageTable

if TYPE_CHECKING:
    from server.engine.penalties import SamplerState


class State(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A prompt and its growing output.

    There is no prefill and no decode state: the sequence has ``total`` tokens of which ``computed`` have
    their keys and values in the cache, and each step lets it catch up by some. When it has caught up, the
    last token's logits give the next token. Preemption sets ``computed`` to 0, a prefix hit raises it.

    Attributes:
        request: the client's.
        arrival: order of arrival, the first is 0; ties of rank go to the earlier.
        rank: the lower, the more urgent: its priority's negative, plus its time of arrival where waiting
            raises priorities.
        tokens: prompt and output.
        group: of a beam, and of a request with beam search itself.
        held_back: its last tokens that it does not compute by itself: of a beam the last one, which all beams
            of the group compute in one step; of a group what its beams have not in common.
        source: of an encoder-decoder, the first tokens of the prompt, which the decoder does not see.
        drafts: tokens guessed after those, which the step in the making or in flight computes too.
        wanted_drafts: how many of these it wants in the next step.
        drafting: the state of its drafting; made when tokens are first drafted for it.
        pending: tokens after those, sampled by launched steps, which the host does not know yet.
        computed: leading tokens whose keys and values are in ``pages``, or will be by the steps launched.
        table: the page of tokens ``[i * page_size, (i + 1) * page_size)`` at index ``i``; 0 where the
            pattern has evicted it.
        evicted_up_to: the index up to which ``pages`` has been searched for such pages.
        page_keys: prefix-cache keys of its leading full pages, as far as they were needed.
        sample_of: id of the first sample of its request, whose prompt it has; its own if it is the only one.
        sampler: the sampler's state of the sequence; made when it first runs.
        prompt_logprobs: of prompt tokens 1, 2, ... as far as computed, where asked for.
        found: leading tokens that the prefix cache had when it was queued.
        shared: pages of the index with its keys that others held when it was looked up last, less
            ``PagePool.gained`` at that time.
        passed_over: steps that it left to short prompts, less those that it had since.
        started: monotonic time at which the engine first worked on it.
        cached_tokens: prompt tokens found in the prefix cache when it first ran.
        preemptions: how often it lost its pages.
    """

    __slots__ = (
        "arrival",
        "cached_tokens",
        "computed",
        "drafting",
        "drafts",
        "evicted_up_to",
        "found",
        "group",
        "held_back",
        "page_keys",
        "passed_over",
        "pending",
        "preemptions",
        "prompt_logprobs",
        "rank",
        "request",
        "sample_of",
        "sampler",
        "shared",
        "source",
        "started",
        "state",
        "table",
        "tokens",
        "wanted_drafts",
    )

    def __init__(self, request: Submit, arrival: int, rank: float | None = None) -> None:
        self.request = request
        self.arrival = arrival
        self.rank = -request.priority if rank is None else rank
        self.state = State.WAITING
        self.tokens = list(request.prompt)
        self.source = request.prompt[: request.source]
        self.group: Sequence | None = None
        self.held_back = 0
        self.drafts: list[int] = []
        self.wanted_drafts = 0
        self.drafting: Any = None
        self.pending = 0
        self.computed = 0
        self.table = PageTable()
        self.evicted_up_to = 0
        self.page_keys: list[bytes] = []
        self.sample_of = request.id
        self.sampler: SamplerState | None = None
        self.prompt_logprobs: list[PositionLogprob] = []
        self.found = self.shared = 0
        self.passed_over = 0
        self.started: float | None = None
        self.cached_tokens = 0
        self.preemptions = 0

    @property
    def pages(self) -> list[int]:
        """Its pages in order; 0 where the pattern has evicted one."""
        return self.table.pages

    @property
    def id(self) -> int:
        """The id under which the server process knows it."""
        return self.request.id

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def decoded_from(self) -> int:
        """Tokens before the first that the decoder sees: 0, or an encoder-decoder's source as laid out."""
        return self.prompt_len - len(self.request.start) if self.request.source else 0

    @property
    def output_len(self) -> int:
        """Tokens generated so far, as far as the host knows."""
        return len(self.tokens) - self.prompt_len

    @property
    def total(self) -> int:
        """Tokens so far, as far as the host knows."""
        return len(self.tokens)

    @property
    def expected(self) -> int:
        """Tokens so far, those pending included."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled; 1 for a decode."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def lacking(self) -> int:
        """Those of them that it computes by itself."""
        return self.remaining - self.held_back

    @property
    def parts(self) -> Listed[Sequence]:
        """The sequences whose tokens are computed for it: itself, or its beams."""
        return (self,)

    @property
    def width(self) -> int:
        """How many sequences these can become."""
        return 1

    @property
    def spread(self) -> tuple[int, int]:
        """How many sequences these are once its tokens are computed, and how many tokens those share."""
        return 1, self.total

    @property
    def decodes(self) -> bool:
        """Whether each of ``parts`` lacks one token, and the next step can compute these."""
        return self.remaining == 1

    @property
    def head(self) -> Sequence:
        """The sequence that is queued for it: itself, or its group."""
        return self.group or self

    def join(self) -> None:
        """Is one sequence again, after its parts have lost their pages."""

    @property
    def to_compute(self) -> int:
        """Tokens still to compute, less those of a waiting sequence that the prefix cache probably has."""
        return self.remaining - (self.found if self.state is State.WAITING else 0)

    @property
    def urgency(self) -> tuple[float, int]:
        """Sort key of the order of service. It never changes, so that no two preempt each other in turn."""
        return (self.rank, self.arrival)

    def outranks(self, other: Sequence) -> bool:
        """Whether it may take the other's place: it has a higher priority, and still is the more urgent."""
        return self.request.priority > other.request.priority and self.urgency < other.urgency

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt are still owed, so that its tokens must be computed."""
        return self.request.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len - 1

    def finish_reason(self, token: int, context_length: int) -> FinishReason | None:
        """Why the sequence ends with ``token``, its newest; ``None`` if it goes on."""
        unending = max(self.request.min_tokens, len(self.request.forced))
        if self.output_len > unending and token in self.request.stop_token_ids:
            return FinishReason.STOP
        if self.output_len >= self.request.max_tokens or self.total >= context_length:
            return FinishReason.LENGTH
        return None
