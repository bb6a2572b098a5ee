"""Every family in batches without padding gives transformers' own vectors, or is refused with the reason."""

import json

import pytest
import torch
import transformers

from attention.within_texts import WithinTexts
from server.encoder_messages import Pooling, Task
from server.engine.encoder_build import build_encoder
from server.engine.encoder_core import embedding
from server.errors import RefusedError
from server.models.encoders.flattened import first_position
from server.models.encoders.head import chances
from server.models.encoders.load import _context_length, load_encoder
from server.models.encoders.recognize import holds_encoder
from server.models.encoders.sentence import read_sentence_files
from server.settings import Settings
from tests.encoders.zoo import CONTEXT, FAMILIES, VOCABULARY, save_encoder
from tests.models_zoo import save_tiny


def load(folder, max_context=None, dtype="auto"):
    return load_encoder(folder, dtype, "cpu", max_context, lambda stage, fraction: None)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_gives_the_vectors_of_transformers(kind, tmp_path):
    folder = save_encoder(kind, tmp_path)
    assert holds_encoder(folder)
    loaded = load(folder)
    assert loaded.tasks == (Task.EMBED,)
    assert (loaded.vocabulary_size, loaded.embedding_size) == (VOCABULARY, 32)
    if kind != "modernbert" and kind != "eurobert":  # whose positions are rotary
        assert loaded.context_length == CONTEXT
    own = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 5, 5, 5, 30, 30, min(CONTEXT, loaded.context_length)]
    texts = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    served = loaded.encoder.hidden(texts, [[] for _ in texts])
    with torch.no_grad():
        for text, vectors in zip(texts, served, strict=True):
            expected = own(torch.tensor([text])).last_hidden_state[0]
            torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["MaskedLM", "SequenceClassification"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_model_with_a_head_embeds_with_its_base(kind, task, tmp_path):
    folder = save_encoder(kind, tmp_path, task)
    own = getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder).eval().base_model
    text = [2, *range(40, 60), 3]
    (vectors,) = load(folder).encoder.hidden([text], [[]])
    with torch.no_grad():
        expected = own(torch.tensor([text])).last_hidden_state[0]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert", "electra", "modernbert"])
def test_a_head_scores_as_in_transformers(kind, tmp_path):
    folder = save_encoder(kind, tmp_path, "SequenceClassification", num_labels=3)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = load(folder)
    assert loaded.tasks == (Task.EMBED, Task.SCORE)
    assert loaded.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    texts = [[2, *range(40, 60), 3], [2, 7, 3]]
    for text, hidden in zip(texts, loaded.encoder.hidden(texts, [[], []]), strict=True):
        with torch.no_grad():
            expected = own(torch.tensor([text])).logits[0]
        torch.testing.assert_close(loaded.head.logits(hidden), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_labels": 2}, [0.5, 0.5]),
        ({"num_labels": 1}, [0.5]),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, [0.5, 0.5]),
        ({"num_labels": 1, "problem_type": "regression"}, None),
    ],
)
def test_probabilities(config, expected):
    made = chances(transformers.BertConfig(**config))
    assert (None if made is None else made(torch.zeros(config["num_labels"])).tolist()) == expected


def test_token_types_reach_the_model(tmp_path):
    folder = save_encoder("bert", tmp_path)
    loaded, own = load(folder), transformers.AutoModel.from_pretrained(folder).eval()
    text, types = [2, 40, 41, 3, 42, 3], [0, 0, 0, 0, 1, 1]
    plain, typed = loaded.encoder.hidden([text, text], [[], types])
    with torch.no_grad():
        expected = own(torch.tensor([text]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    torch.testing.assert_close(typed, expected, atol=1e-5, rtol=1e-5)
    assert (plain - typed).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "types", "config", "known"),
    [
        ("bert", True, {}, 2),
        ("bert", True, {"type_vocab_size": 1}, 1),
        ("bert", False, {}, 0),  # the tokenizer's makers did not mean them
        ("distilbert", True, {}, 0),  # which takes none
    ],
)
def test_token_types_are_those_that_transformers_passes(kind, types, config, known, tmp_path):
    assert load(save_encoder(kind, tmp_path, types=types, **config)).token_types == known


def test_a_model_that_mixes_texts_is_refused(tmp_path, monkeypatch):
    """The start-up check finds whatever a batch does to its texts."""
    monkeypatch.setattr(
        "server.models.encoders.flattened.WithinTexts",
        lambda lengths, causal: WithinTexts([sum(lengths)], causal=causal),
    )
    with pytest.raises(RefusedError, match=r"not those that transformers computes .* standard deviations"):
        load(save_encoder("bert", tmp_path))


def test_heads_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="BertForTokenClassification has a head whose task is not served"):
        load(save_encoder("bert", tmp_path, "TokenClassification"))


def test_a_decoder_is_none(tmp_path):
    assert not holds_encoder(save_tiny("llama", tmp_path))


def test_sixteen_bits_and_a_shorter_context(tmp_path):
    loaded = load(save_encoder("bert", tmp_path), max_context=50, dtype="bfloat16")
    assert (loaded.context_length, loaded.dtype) == (50, torch.bfloat16)
    with pytest.raises(RefusedError, match="--max-context 97 is more than the model's own 96 positions"):
        load(tmp_path, max_context=97)


def test_a_context_is_as_long_as_positions_are_left(tmp_path):
    """A table with a row for padding does not say that positions begin behind it."""
    model = transformers.AutoModel.from_pretrained(save_encoder("bert", tmp_path)).eval()
    model.embeddings.position_embeddings.padding_idx = 0
    first, files = first_position(model), read_sentence_files(tmp_path)
    assert (first, _context_length(model, first, files, None)) == (0, CONTEXT)


@pytest.mark.parametrize(("task", "special"), [("", 2), ("SequenceClassification", 3)])
def test_a_context_has_room_beside_the_special_tokens(task, special, tmp_path):
    folder = save_encoder("bert", tmp_path, task)
    assert load(folder, max_context=special + 1).context_length == special + 1
    with pytest.raises(
        RefusedError, match=f"has {special} special tokens .* --max-context larger than {special}"
    ):
        load(folder, max_context=special)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, Pooling.LAST),
        ({"pooling_mode_mean_tokens": True}, Pooling.MEAN),
    ],
)
def test_the_makers_pooling_is_taken(config, pooling, tmp_path):
    modules = [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "1"}, {"type": "x.Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps(config))
    files = read_sentence_files(tmp_path)
    assert (files.pooling, files.normalized, files.longest) == (pooling, True, None)


@pytest.mark.parametrize(
    ("modules", "pooling", "sentence"),
    [
        ([{"type": "x.Dense"}], {}, "has a Dense, which is not computed here"),
        ([{"type": "x.Pooling", "path": "1"}], {"pooling_mode_max_tokens": True}, "by max_tokens; here"),
        ([{"type": "x.Pooling", "path": "1"}], {"pooling_mode": ["cls", "mean"]}, "by cls and mean; here"),
        ({}, {}, "holds no list of modules"),
    ],
)
def test_what_is_not_computed_is_refused(modules, pooling, sentence, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(RefusedError, match=sentence):
        read_sentence_files(tmp_path)


def test_pooling():
    hidden = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert embedding(hidden, Pooling.MEAN, normalize=False).tolist() == [[3, 4]]
    assert embedding(hidden, Pooling.CLS, normalize=False).tolist() == [[3, 4]]
    assert embedding(hidden, Pooling.LAST, normalize=False).tolist() == [[6, 8]]
    assert embedding(hidden, Pooling.NONE, normalize=False).tolist() == hidden.tolist()
    torch.testing.assert_close(embedding(hidden, Pooling.LAST, normalize=True), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"attention": "sliding_window", "page_size": 8},
            "--attention, --page-size: for models that generate",
        ),
        ({"weights": "int8"}, "--weights: for models that generate text, and this one is an encoder"),
    ],
)
def test_settings_without_effect_are_refused(settings, sentence, tmp_path):
    with pytest.raises(RefusedError, match=sentence):
        build_encoder(Settings(**settings), tmp_path, lambda stage, fraction: None)
