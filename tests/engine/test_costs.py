"""Lower bounds of steps' costs: by hand for small models, and the counts of an engine that ran them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.cache import PagedCache
from server.engine.costs import Cost, ModelWeights, Part, StepCosts
from tests.engine.harness import greedy_requests, load, make_core
from tests.models_zoo import VOCABULARY, save_tiny

# The zoo's llama: hidden size 64, 2 layers, 4 query and 2 KV heads of 16, MLP of 128.
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
BODY, HEAD, NORMS = 2 * LAYER, VOCABULARY * 64, 5 * 64
FLOAT = 4
PAGE_SIZE = 16
PAGE = PAGE_SIZE * 2 * (16 + 16) * FLOAT
PAIR = 4 * (16 + 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def by_hand(tokens, rows, pages, pairs):
    """The cost of one step; pages and pairs are those of one layer."""
    weights = (BODY + HEAD + NORMS + tokens * 64) * FLOAT
    keys = 2 * (pages * PAGE + tokens * PAGE // PAGE_SIZE)
    return weights + keys, 2 * (tokens * BODY + rows * HEAD + 2 * pairs * PAIR)


def costs_of(core):
    """Bytes and operations of every step until nothing is left to do."""
    found = []
    while core.has_work:
        stats = core.step().stats
        found.append((stats.bytes_moved, stats.flops))
    return found


def test_a_prompt_and_its_answer_under_full_attention(llama):
    core = make_core(load(llama), max_batch_tokens=64, prefix_cache=False)
    core.submit(greedy_requests([list(range(4, 104))], 3)[0])
    assert costs_of(core) == [
        # A chunk of 64 tokens on 4 pages; no logits are wanted.
        by_hand(64, 0, 4, 64 * 65 // 2),
        # The other 36, and the logits of the last one.
        by_hand(36, 1, 7, 100 * 101 // 2 - 64 * 65 // 2),
        by_hand(1, 1, 7, 101),
        by_hand(1, 1, 7, 102),
    ]
    idle = core.stats()
    assert (idle.bytes_moved, idle.flops) == (0, 0)
    assert idle.memory_used > 0


def test_a_window_moves_less(llama):
    options = {"window": "20", "sinks": "2"}
    core = make_core(load(llama), backend="sliding_window", options=options, prefix_cache=False)
    core.submit(greedy_requests([list(range(4, 104))], 3)[0])
    assert costs_of(core) == [
        # Query i sees i + 1 keys, 22 at most.
        by_hand(100, 1, 7, 21 * 22 // 2 + 79 * 22),
        # Position 100 sees 0, 1 and 81 to 100: pages 0, 5 and 6. Position 101 sees 82 to 101: the same pages.
        by_hand(1, 1, 3, 22),
        by_hand(1, 1, 3, 22),
    ]


def test_sequences_share_the_weights_but_not_the_pages(llama):
    core = make_core(load(llama), prefix_cache=False)
    for request in greedy_requests([list(range(4, 24)), list(range(4, 9))], 2):
        core.submit(request)
    assert costs_of(core) == [
        by_hand(25, 2, 2 + 1, 20 * 21 // 2 + 5 * 6 // 2),
        by_hand(2, 2, 2 + 1, 21 + 6),
    ]


def test_logits_of_the_prompt_count(llama):
    core = make_core(load(llama), prefix_cache=False)
    core.submit(greedy_requests([list(range(4, 24))], 1, prompt_logprobs=0)[0])
    assert costs_of(core) == [by_hand(20, 20, 2, 20 * 21 // 2)]


def test_summaries_are_read_and_keys_in_fewer_bits_move_less(llama):
    loaded = load(llama)
    options = {"pattern": "topk", "budget": "80", "dense_layers": "0"}
    core = make_core(loaded, backend="sparse", options=options, prefix_cache=False)
    core.submit(greedy_requests([list(range(4, 204))], 2)[0])
    summary = 2 * 2 * 16 * FLOAT
    before, after = costs_of(core)
    assert before == by_hand(200, 1, 13, 200 * 201 // 2)
    bytes_moved, flops = by_hand(1, 1, 0, 0)
    # The first layer reads everything, the other one 5 pages, as the 13 summaries tell.
    assert after == (bytes_moved + (13 + 5) * PAGE + 13 * summary, flops + 2 * (201 + 80) * PAIR)
    half = StepCosts(loaded.model, loaded.layers, PagedCache(loaded.layers, 3, PAGE_SIZE, torch.float16))
    assert half.of(1, 1, ()).bytes == half.weights.cost(1, 1).bytes + 2 * PAGE // 2 // PAGE_SIZE


def test_the_reach_is_where_attention_takes_as_much_as_the_weights(llama):
    costs = make_core(load(llama)).costs
    # 2 layers of 4 query heads, with keys and values of 16.
    assert costs.reach == BODY / (2 * 4 * (16 + 16))


def test_packed_weights_count_as_they_are_kept(llama):
    loaded = load(llama)
    before = ModelWeights.of(loaded.model)
    assert before.stored == loaded.parameters * FLOAT == (BODY + NORMS + 2 * HEAD) * FLOAT
    after = ModelWeights.of(load(llama, weights="int4").model)
    # 32 weights of 4 bits with a scale and an offset take 20 bytes; in the head of 8 bits with a scale, 34.
    assert after.body == Part(BODY * 20 // 32 + NORMS * FLOAT, BODY)
    assert after.head == Part(HEAD * 34 // 32, HEAD)
    assert after.stored == after.body.bytes + after.head.bytes + HEAD * FLOAT


def test_tied_embeddings_are_stored_once_and_read_as_the_head(tmp_path):
    weights = ModelWeights.of(load(save_tiny("llama", tmp_path, tie_word_embeddings=True)).model)
    assert weights.head == Part(HEAD * FLOAT, HEAD)
    assert weights.stored == (BODY + NORMS + HEAD) * FLOAT


def test_experts_count_by_the_share_that_tokens_are_routed_to(tmp_path):
    weights = ModelWeights.of(load(save_tiny("mixtral", tmp_path)).model)
    # 4 experts of 3 x 64 x 128 in each of 2 layers, and their routers; a token takes 2 of them.
    experts = 2 * 4 * 3 * 64 * 128
    attention = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 4 * 64)
    assert (weights.experts, weights.active) == (Part(experts * FLOAT, experts), 0.5)
    assert weights.body == Part((attention + NORMS) * FLOAT, attention)
    one = weights.cost(1, 0)
    assert one.flops == 2 * (attention + experts // 2)
    assert one.bytes == (attention + NORMS + HEAD + 64 + experts // 2) * FLOAT
    # Two tokens that are routed evenly leave a quarter of the experts unread.
    assert weights.cost(2, 0).bytes - one.bytes == (64 + experts // 4) * FLOAT


@given(st.integers(1, 10_000), st.integers(0, 100), st.floats(0.01, 1))
def test_more_tokens_cost_more_and_no_forward_reads_more_than_all(tokens, rows, active):
    weights = ModelWeights(Part(1000, 500), Part(8000, 4000), active, Part(100, 50), 4, 10_000)
    cost, more = weights.cost(tokens, rows), weights.cost(tokens + 1, rows)
    assert cost.bytes < more.bytes <= 9100 + 4 * (tokens + 1)
    assert cost.flops < more.flops


def test_the_example_in_the_words():
    million = 10**6
    body, head = Part(100 * million, 100 * million), Part(10 * million, 10 * million)
    weights = ModelWeights(body, Part(), 1.0, head, 1000, 0)
    assert weights.cost(1, 1) == Cost(110_001_000, 220 * million)
    assert weights.cost(512, 1) == Cost(110_512_000, 102_420 * million)
