"""The text as servers of a small random model decode it, with weights as they are: steps of any size agree.

What a window costs the default model is in ``test_evaluator``.
"""

import math
import random
from statistics import fmean

import pytest

from loadtest.deployment import FULL, window
from loadtest.evaluation import text as texts
from loadtest.evaluation.divergence import blocks_against, divergence
from loadtest.evaluation.memory import memory
from loadtest.evaluation.text import Decoded, Tokens, decode_slice, slices
from loadtest.texts import prose, reference
from longspan import LongspanError
from tests.loadtest.within import within

pytestmark = pytest.mark.long

LENGTH = 256
SEEN = 48
BLOCK = 32
TEXT = prose(reference())[:20_000]
PAGE = 16


@pytest.fixture(scope="module")
def clients(tiny):
    """Full attention, and a window that sees much less than the contexts have."""
    settings = {"model": str(tiny), "weights": "float", "kv_memory": "8MiB", "max_context": 600, "threads": 1}
    with (
        within(FULL, **settings) as full,
        within(window(SEEN - 4, 4), **settings) as near,
        full.client() as asks_full,
        near.client() as asks_near,
    ):
        yield {"full": asks_full, "window": asks_near}


@pytest.fixture(scope="module")
def part(clients):
    return slices(texts.tokens(clients["full"], TEXT, 3 * LENGTH), LENGTH, 0, BLOCK)[0]


@pytest.fixture(scope="module")
def decoded(clients, part):
    return {name: decode_slice(client, part, 20) for name, client in clients.items()}


@pytest.mark.parametrize("name", ["full", "window"])
def test_decoded_tokens_are_as_likely_as_in_a_prompt(clients, part, decoded, name):
    """Both patterns see the same in a prompt as while they decode."""
    with clients[name].stream(part.ids, max_tokens=1, prompt_logprobs=0, temperature=0) as stream:
        assert list(stream)
    reference = [math.nan, *(position.chosen.logprob for position in stream.prompt_logprobs)]
    assert len(decoded[name]) == len(part.starts) == 4
    for start, block in zip(part.starts, decoded[name], strict=True):
        assert block.ids == part.ids[start : start + BLOCK]
        expected = reference[start : start + BLOCK]
        assert block.logprobs == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", ["full", "window"])
def test_blocks_take_their_context_from_the_prefix_cache(part, decoded, name):
    for start, block in zip(part.starts, decoded[name], strict=True):
        assert start - 1 - PAGE <= block.cached_tokens < start


def test_rows_tell_how_far_a_window_is_from_full(part, decoded):
    own = blocks_against("window", part, decoded["window"], decoded["full"])
    full = blocks_against("full", part, decoded["full"])
    again = blocks_against("again", part, decoded["full"], decoded["full"])
    assert [row.block for row in own] == list(range(part.first_block, part.first_block + 4))
    assert [row.start for row in own] == list(part.starts)
    assert all(math.isnan(row.kl) and math.isnan(row.same_top) for row in full)
    assert all(row.kl == 0 and row.same_top == 1 for row in again)
    assert min(row.kl for row in own) > 0.001
    assert 0 < fmean(row.same_top for row in own) < 1, [row.same_top for row in own]
    assert all(row.logprobs == block.logprobs for row, block in zip(own, decoded["window"], strict=True))


def test_a_refusal_of_the_server_is_an_error_of_its_rows(clients, part):
    long = texts.Slice(700, 3, tuple(part.ids) * 3, (500, 690), 8)
    found = decode_slice(clients["full"], long, 20)
    assert all(isinstance(each, LongspanError) for each in found)
    rows = blocks_against("full", long, found)
    assert [(row.block, row.logprobs) for row in rows] == [(3, ()), (4, ())]
    assert all("599 at most" in row.error for row in rows)


def test_memory_is_that_of_the_pages_that_the_pattern_keeps(clients, part):
    load = clients["full"].server_info().load
    page = load.kv_bytes / (load.pages_total + 1)
    rows = {name: memory(client, name, part.ids, int(101.5 * page)) for name, client in clients.items()}
    assert rows["full"].bytes == LENGTH / PAGE * page
    assert rows["full"].fits == 100 * PAGE // LENGTH
    assert SEEN / PAGE * page <= rows["window"].bytes <= (SEEN / PAGE + 2) * page
    assert rows["window"].fits == 100 * page // rows["window"].bytes
    assert "599 at most" in memory(clients["full"], "full", part.ids * 3).error


def test_pieces_of_a_text_have_the_tokens_of_the_whole(clients, monkeypatch):
    whole = texts.tokens(clients["full"], TEXT, 10**6)
    monkeypatch.setattr(texts, "_PIECE", 1500)
    assert texts.tokens(clients["full"], TEXT, 10**6) == whole
    assert texts.tokens(clients["full"], TEXT, 77).ids == whole.ids[:77]


def test_slices_are_disjoint_and_end_in_blocks():
    text = Tokens((7,), tuple(range(100, 2145)))
    found = slices(text, 512, 5, 32)
    assert len(found) == 4
    assert sorted(part.ids[1] for part in found) == [100, 611, 1122, 1633]
    assert [part.first_block for part in found] == [0, 8, 16, 24]
    for part in found:
        assert part.ids[0] == 7
        assert len(part.ids) == 512
        assert part.starts == (256, 288, 320, 352, 384, 416, 448, 480)
    assert slices(text, 512, 5, 32) == found
    assert [part.ids for part in slices(text, 512, 6, 32)] != [part.ids for part in found]


@pytest.mark.parametrize("length", [400, 513, 1000, 2045])
def test_few_slices_have_more_blocks_and_none_overlap(length):
    (*_, part) = slices(Tokens((), tuple(range(2045))), length, 0, 20)
    assert part.starts[0] >= length // 2
    assert part.starts[-1] == length - 20
    assert all(later - earlier >= 20 for earlier, later in zip(part.starts, part.starts[1:], strict=False))
    assert len(part.starts) == min(-(-48 // (2045 // length)), (length + 1) // 2 // 20)


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        (900, 1024, "the text has 900 tokens, but a context of 1024 needs 1023"),
        (900, 50, "no room for a block of 32 in its last half; take contexts of at least 70"),
    ],
)
def test_a_text_that_is_too_short_is_told(ids, length, message):
    with pytest.raises(ValueError, match=message):
        slices(Tokens((1,), tuple(range(ids))), length, 0, 32)


def test_the_divergence_is_a_lower_bound_and_close():
    rng = random.Random(0)
    for _ in range(50):
        full = [rng.expovariate(1) ** 3 for _ in range(60)]
        own = [weight * math.exp(rng.gauss(0, 0.5)) for weight in full]
        p, q = ([weight / sum(weights) for weight in weights] for weights in (full, own))
        exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        told = divergence(_told(p, 3), _told(q, 3))
        assert 0.5 * exact < told <= exact + 1e-12


def _told(probabilities, token):
    likely = sorted(range(60), key=lambda i: -probabilities[i])[:20]
    top = {i: math.log(probabilities[i]) for i in likely}
    return Decoded((math.log(probabilities[token]),), (token,), (top,), 0)
