"""What a sequence begins with: pages of another sample of its request, or of the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listed

from server.engine.kv_manager import KVManager
from server.engine.sequence import Sequence


class Sharing:
    """Has the samples of a request computed from one prefill, also without the prefix cache.

    A sample that runs and has computed the prompt gives its pages to one that begins, which computes the
    prompt's last token and goes on from there. Where none runs, the prefix cache may have the prompt's full
    pages.

    Args:
        kv: the pages.
        running: the sequences that run, as they come and go.
        by_id: all sequences, as they come and go.
    """

    def __init__(self, kv: KVManager, running: Listed[Sequence], by_id: Mapping[int, Sequence]) -> None:
        self._kv, self._running, self._by_id = kv, running, by_id

    def awaited(self, sequence: Sequence) -> Sequence | None:
        """The leader of a sequence, if waiting until it has computed the prompt gets that one pages."""
        named = sequence.request.leader
        leader = None if named is None else self._by_id.get(named)
        if leader is None:
            return None
        own, other = sequence.request, leader.request
        if sequence.sample_of == sequence.id and (own.prompt, own.salt) == (other.prompt, other.salt):
            sequence.sample_of = leader.sample_of
        shares = self._kv.looks_up(sequence) or self._forks(sequence)
        return leader if shares and leader.computed < leader.prompt_len else None

    def found(self, sequence: Sequence) -> int:
        """Tokens that ``begin`` would give now."""
        cached = self._kv.cached_prefix(sequence)
        return cached if self._giver(sequence) is None else sequence.prompt_len - 1

    def most_shared(self, sequence: Sequence) -> int:
        """The most pages that ``begin`` could give of those that others hold."""
        shared = self._kv.most_shared(sequence)
        return shared if self._giver(sequence) is None else self._kv.pages_for(sequence.prompt_len - 1)

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence without pages those of what others have computed of its tokens."""
        giver = self._giver(sequence)
        if giver is None:
            self._kv.adopt_prefix(sequence)
        else:
            self._kv.fork(giver, sequence, sequence.prompt_len - 1)

    def _forks(self, sequence: Sequence) -> bool:
        # Keys that depend on how long a sequence is are found by the prefix cache, where they are the same.
        return self._kv.salt is None and not sequence.wants_prompt_logprobs

    def _giver(self, sequence: Sequence) -> Sequence | None:
        # Of a sample that was preempted the prefix cache probably has more than the prompt.
        if not self._forks(sequence) or (sequence.output_len and self._kv.looks_up(sequence)):
            return None
        samples = (other for other in self._running if other.sample_of == sequence.sample_of)
        return next((other for other in samples if self._has_prompt(other, sequence)), None)

    def _has_prompt(self, other: Sequence, sequence: Sequence) -> bool:
        """Whether another sequence has all pages that the last token of a sequence's prompt sees."""
        last = sequence.prompt_len - 1
        return (
            other.computed >= last and other.evicted_up_to <= self._kv.expired(last, self._kv.page_size).stop
        )
