"""Families that compute attention in their own code: texts of one length are a batch."""

import copy
import json

import pytest
import torch
import transformers

from server.encoder_messages import Encode, Task
from server.engine.encoder_build import build_encoder
from server.errors import RefusedError
from server.models.encoders import by_length
from server.models.encoders.load import load_encoder
from server.models.encoders.recognize import holds_encoder
from server.models.recognize import read_config
from server.settings import Settings
from tests.encoders.zoo import CONTEXT, OWN_ATTENTION, VOCABULARY, save_encoder

LENGTHS = (5, 5, 40, 1, 40, 5, 39, CONTEXT, 5)  # BigBird's and Reformer's rules change with the length


def load(folder):
    return load_encoder(folder, "auto", "cpu", None, lambda stage, fraction: None)


def fresh(folder, kind="", **more):
    """A model of transformers that has seen no text yet, whenever it is called."""
    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    model = auto.from_pretrained(folder).eval()

    def compute(text):
        with torch.no_grad():
            return copy.deepcopy(model)(input_ids=torch.tensor([text]), **more)

    return compute


def random_texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_a_family_gives_the_vectors_of_transformers(kind, tmp_path):
    folder = save_encoder(kind, tmp_path)
    assert holds_encoder(folder)
    loaded = load(folder)
    assert (loaded.encoder.executor, loaded.encoder.attention) == ("by_length", "own")
    assert loaded.context_length == CONTEXT
    texts = random_texts()
    served = loaded.encoder.hidden(texts, [[] for _ in texts])
    own = fresh(folder)
    for text, vectors in zip(texts, served, strict=True):
        expected = own(text).last_hidden_state[0]
        torch.testing.assert_close(vectors, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_a_family_scores_as_in_transformers(kind, tmp_path):
    """Longformer's head for labels sees the first token by global attention."""
    folder = save_encoder(kind, tmp_path, "SequenceClassification", num_labels=3)
    loaded = load(folder)
    assert loaded.tasks == (Task.EMBED, Task.SCORE)
    texts = random_texts((5, 40, CONTEXT))
    own = fresh(folder, "SequenceClassification")
    for text, hidden in zip(texts, loaded.encoder.hidden(texts, [[]] * 3), strict=True):
        expected = own(text).logits[0]
        torch.testing.assert_close(loaded.head.logits(hidden), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_a_family_fills_as_in_transformers(kind, tmp_path):
    folder = save_encoder(kind, tmp_path, "MaskedLM")
    loaded = load(folder)
    assert loaded.tasks == (Task.EMBED, Task.FILL)
    text = random_texts((40,))[0]
    (hidden,) = loaded.encoder.hidden([text], [[]])
    expected = fresh(folder, "MaskedLM")(text).logits[0]
    got = loaded.head.logits(hidden[[3, 9]])
    torch.testing.assert_close(got, expected[[3, 9]], atol=1e-4, rtol=1e-5)


def test_token_types_reach_the_model(tmp_path):
    folder = save_encoder("big_bird", tmp_path)
    types = [0, 0, 1, 1, 1]
    text = random_texts((5,))[0]
    plain, typed = load(folder).encoder.hidden([text, text], [[], types])
    expected = fresh(folder, token_type_ids=torch.tensor([types]))(text)
    torch.testing.assert_close(typed, expected.last_hidden_state[0], atol=1e-5, rtol=1e-5)
    assert (plain - typed).abs().max() > 0.01


def test_a_model_that_a_short_text_changes_is_refused(tmp_path, monkeypatch):
    """The start-up check finds what texts leave behind in a model."""
    folder = save_encoder("big_bird", tmp_path)
    monkeypatch.setattr(by_length, "reset", lambda base, length: None)
    with pytest.raises(RefusedError, match="vectors are not those that transformers computes"):
        load(folder)


def test_a_step_serves_texts_of_several_lengths(tmp_path):
    folder = save_encoder("mpnet", tmp_path)
    core, ready = build_encoder(Settings(threads=1), folder, lambda stage, fraction: None)
    assert (ready.executor, ready.attention_kernel) == ("by_length", "transformers")
    texts = random_texts()
    for id_, tokens in enumerate(texts):
        core.submit(Encode(id=id_, task=Task.EMBED, turn=id_, tokens=tokens))
    outputs = core.step().sequences
    own = fresh(folder)
    assert len(outputs) == len(texts)
    for output in outputs:
        expected = own(texts[output.id]).last_hidden_state[0].mean(0)
        got = torch.frombuffer(bytearray(output.values), dtype=torch.float32)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_weights_without_the_head_that_a_config_names_embed(tmp_path):
    """As published with all-mpnet-base-v2."""
    folder = save_encoder("mpnet", tmp_path)
    change(folder, architectures=["MPNetForMaskedLM"])
    loaded = load(folder)
    assert (loaded.tasks, loaded.head, loaded.architecture) == ((Task.EMBED,), None, "MPNetModel")


def test_hash_functions_are_drawn_once(tmp_path):
    folder = save_encoder("reformer", tmp_path)
    change(folder, hash_seed=None)
    loaded, text = load(folder), random_texts((40,))
    (one,), (other,) = loaded.encoder.hidden(text, [[]]), loaded.encoder.hidden(text, [[]])
    assert torch.equal(one, other)
    change(folder, num_buckets=None)
    with pytest.raises(RefusedError, match=r"leaves the number of hash buckets \(num_buckets\)"):
        load(folder)


def test_a_reformer_that_generates_is_refused(tmp_path):
    folder = save_encoder("reformer", tmp_path, "CausalLM", is_decoder=True)
    assert not holds_encoder(folder)
    with pytest.raises(RefusedError, match=r"ReformerModelWithLMHead does not go through .* interface"):
        read_config(folder)


def test_transformer_xl_is_refused_for_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transfo-xl"}))
    with pytest.raises(RefusedError, match=r"transformers has no class any more, .* pattern=segment"):
        read_config(tmp_path)


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
