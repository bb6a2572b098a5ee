"""The prefix cache within one salt and across two."""

from __future__ import annotations

import pytest

from server.engine.kv_manager import KVManager
from server.engine.sequence import Sequence
from server.messages import Sampling, Submit
from tests.engine.harness import greedy_requests, make_core, run

PAGE = 4
PROMPT = list(range(20))


def computed(kv: KVManager, salt: bytes, prompt: list[int] = PROMPT, arrival: int = 0) -> Sequence:
    """A sequence that has been computed and has left its pages in the cache."""
    sequence = Sequence(
        Submit(id=arrival, prompt=prompt, sampling=Sampling(), max_tokens=4, salt=salt), arrival
    )
    kv.adopt_prefix(sequence)
    assert kv.extend(sequence, sequence.remaining)
    kv.advance(sequence, sequence.remaining)
    kv.release(sequence)
    return sequence


def found(kv: KVManager, salt: bytes, prompt: list[int] = PROMPT) -> int:
    sequence = Sequence(Submit(id=99, prompt=prompt, sampling=Sampling(), max_tokens=4, salt=salt), 99)
    return kv.cached_prefix(sequence)


@pytest.mark.parametrize("salt", [b"", b"a" * 16])
@pytest.mark.parametrize("other", [b"", b"b" * 16, b"a" * 15 + b"b"])
def test_pages_are_found_within_one_salt_only(salt: bytes, other: bytes) -> None:
    kv = KVManager(50, PAGE)
    computed(kv, salt)
    assert found(kv, salt) == 16  # all but the last page, whose last token must be computed
    assert found(kv, other) == (16 if salt == other else 0)
    computed(kv, other, arrival=1)
    assert found(kv, other) == found(kv, salt) == 16


def test_a_salt_is_not_a_page() -> None:
    """A prompt whose first page spells another's salt, or the key of another's page, finds nothing of it."""
    kv = KVManager(50, PAGE)
    first = computed(kv, b"")
    key = first.page_keys[0]
    assert found(kv, key, PROMPT[PAGE:]) == 12, "a salt that equals a key would continue after it,"
    # which takes a salt of the attacker's choice; the server draws them, by a secret of the process.
    tokens = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 16, 4)]
    assert found(kv, b"", tokens + PROMPT[PAGE:]) == 0


def test_answers_are_the_same_under_any_salt(llama) -> None:
    core = make_core(llama)
    prompts = [PROMPT * 3] * 3
    requests = greedy_requests(prompts, 6)
    salted = [*greedy_requests(prompts[:1], 6, first_id=10, salt=b"a" * 16)]
    plain = run(core, requests)
    other = run(core, salted)
    assert other[10].tokens == plain[1].tokens
    assert other[10].cached_tokens == 0
    assert run(core, greedy_requests(prompts[:1], 6, first_id=20, salt=b"a" * 16))[20].cached_tokens > 0
