"""Every family over pages gives what transformers' ``generate`` does, in any batch, or is refused."""

import msgspec
import pytest
import torch

from server.errors import RefusedError
from server.messages import FinishReason, Sampling, Submit
from server.models.encoder_decoders import load as loading
from server.models.encoder_decoders.recognize import holds_encoder_decoder
from server.models.load import read_model
from tests.encoder_decoders.harness import generated, load, make_core, own_model, requests, sources_of
from tests.encoder_decoders.zoo import CONTEXT, FAMILIES, REFUSED, save_encoder_decoder
from tests.engine.harness import run

LENGTHS = (1, 8, 8, 30, 70, 17)
TOKENS = 12  # more than a page
# One of each way to count positions; the others in long runs.
QUICK = ("bart", "marian", "m2m_100", "t5", "umt5", "longt5", "led")
EVERY = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.stress) for kind in FAMILIES]


@pytest.mark.parametrize("kind", EVERY)
def test_a_family_generates_as_in_transformers(kind, tmp_path):
    folder = save_encoder_decoder(kind, tmp_path)
    assert holds_encoder_decoder(folder)
    found = load(folder)
    assert found.info.source_length == CONTEXT
    start, own = FAMILIES[kind]["decoder_start_token_id"], own_model(folder)
    sources = sources_of(*LENGTHS)
    said = own.generation_config
    expected = [generated(own, source, TOKENS) for source in sources]
    ends = {"stop_token_ids": [said.eos_token_id], "forced_end": said.forced_eos_token_id}
    asked = requests(sources, start, TOKENS, **ends)
    together = run(make_core(found), asked)
    assert [together[request.id].tokens for request in asked] == expected
    alone = run(make_core(found, kernel="reference"), asked[3:4])
    assert alone[4].tokens == expected[3]


def test_equal_sources_share_pages_and_others_do_not(tmp_path):
    found = load(save_encoder_decoder("bart", tmp_path))
    core = make_core(found)
    source, other = sources_of(20, 20)
    first = run(core, requests([source], 2, 10))[1]
    again = run(core, requests([source], 2, 10))[1]
    assert (first.cached_tokens, again.cached_tokens) == (0, 20)
    assert again.tokens == first.tokens
    # The same first pages, but every token of a source sees the last one.
    assert run(core, requests([[*source[:-1], other[-1]]], 2, 10))[1].cached_tokens == 0
    longer = run(core, requests([[*source, 7]], 2, 10))[1]
    assert longer.cached_tokens == 0
    salted = run(core, requests([source], 2, 10, salt=b"x"))[1]
    assert (salted.cached_tokens, salted.tokens) == (0, first.tokens)


@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_preempted_sequences_go_on_as_if_nothing_had_happened(kind, tmp_path):
    folder = save_encoder_decoder(kind, tmp_path)
    found, own = load(folder, 64), own_model(folder)
    asked = requests(sources_of(20, 33, 47), FAMILIES[kind]["decoder_start_token_id"], 28)
    unending = {"eos_token_id": None, "forced_eos_token_id": None}
    expected = [generated(own, request.prompt, 28, **unending) for request in asked]
    for cache in (True, False):
        outcomes = run(make_core(found, pages=24, prefix_cache=cache), asked)
        assert sum(outcome.preemptions for outcome in outcomes.values()) > 0
        assert [outcomes[request.id].tokens for request in asked] == expected


def test_a_source_is_computed_in_chunks_of_the_budget(tmp_path):
    """A source of more tokens than a step has takes several, while others go on."""
    folder = save_encoder_decoder("mbart", tmp_path)
    found, own = load(folder), own_model(folder)
    sources = sources_of(100, 5, 90, 12, 77)
    core = make_core(found, max_batch_tokens=16, prompt_step_seconds=1e-9)
    asked = requests(sources, 2, 12)
    outcomes = run(core, asked)
    for request in asked:
        expected = generated(own, request.prompt, 12, eos_token_id=None, forced_eos_token_id=None)
        assert outcomes[request.id].tokens == expected


def test_an_aborted_source_leaves_no_pages_behind(tmp_path):
    found = load(save_encoder_decoder("bart", tmp_path))
    core = make_core(found, max_batch_tokens=16)
    (source,) = sources_of(60)
    (request,) = requests([source], 2, 10)
    core.submit(request)
    core.step()
    core.abort(request.id)
    assert core.kv.pool.cached == core.kv.pool.held == 0
    assert run(core, [request])[1].cached_tokens == 0


def test_an_error_of_a_source_ends_its_sequence_and_not_the_engine(tmp_path):
    core = make_core(load(save_encoder_decoder("bart", tmp_path)))
    wrong, right = sources_of(20, 20)
    expected = run(core, requests([right], 2, 5))[1].tokens
    encode = core.runner.executor._encode

    def broken(step):
        if any(source == wrong for source in step.sources):
            raise RuntimeError("a kernel refuses")
        encode(step)

    core.runner.executor._encode = broken
    assert run(core, requests([wrong], 2, 5))[1].finish is FinishReason.FAILED
    assert run(core, requests([right], 2, 5))[1].tokens == expected


def test_samples_share_their_source(tmp_path):
    found = load(save_encoder_decoder("bart", tmp_path))
    (source,) = sources_of(40)
    drawn = [Sampling(temperature=1.0, seed=seed, top_k=20) for seed in (1, 2, 3)]
    asked = [
        Submit(
            id=number,
            prompt=source,
            start=[2],
            max_tokens=15,
            sampling=sampling,
            leader=None if number == 1 else 1,
        )
        for number, sampling in enumerate(drawn, 1)
    ]
    together = run(make_core(found), asked)
    assert [together[number].cached_tokens for number in (1, 2, 3)] == [0, 40, 40]
    assert len({tuple(outcome.tokens) for outcome in together.values()}) == 3
    for request in asked:
        (alone,) = run(make_core(found), [msgspec.structs.replace(request, leader=None)]).values()
        assert alone.tokens == together[request.id].tokens


def test_steps_launched_ahead_give_the_same(tmp_path):
    found = load(save_encoder_decoder("bart", tmp_path))
    asked = requests(sources_of(*LENGTHS), 2, 20)
    plain, ahead = run(make_core(found), asked), run(make_core(found, ahead=True), asked)
    assert {i: one.tokens for i, one in plain.items()} == {i: one.tokens for i, one in ahead.items()}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_is_not_served_is_refused(kind, tmp_path):
    with pytest.raises(RefusedError, match=r"transformers' attention interface|cannot be served"):
        load(save_encoder_decoder(kind, tmp_path))


def test_a_target_of_another_vocabulary_is_refused(tmp_path):
    """A source's token that only the target knows ended the engine."""
    apart = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    folder = save_encoder_decoder("marian", tmp_path, decoder_vocab_size=400, **apart)
    with pytest.raises(RefusedError, match="has a vocabulary for the source and another one for the target"):
        load(folder)


def test_more_logits_than_embeddings_are_refused(tmp_path, monkeypatch):
    def widened(kind, *others):
        model = read_model(kind, *others)
        model.lm_head = torch.nn.Linear(64, 330, bias=False)
        return model

    monkeypatch.setattr(loading, "read_model", widened)
    with pytest.raises(RefusedError, match="predicts 330 tokens, of which its source may have 320"):
        load(save_encoder_decoder("t5", tmp_path))


def test_sixteen_bits_and_a_shorter_context(tmp_path):
    folder = save_encoder_decoder("bart", tmp_path)
    found = load(folder, 50, "bfloat16")
    assert (found.info.source_length, found.loaded.dtype) == (50, torch.bfloat16)
    with pytest.raises(RefusedError, match="--max-context 129 is more than the model's own 128 positions"):
        load(folder, 129)
    core = make_core(load(folder, 20))
    with pytest.raises(ValueError, match="a source of 21 tokens is longer than 20"):
        core.submit(requests(sources_of(21), 2, 1)[0])
