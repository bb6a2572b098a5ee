"""Models that can't be served are refused with the reason, where possible before their weights are read."""

import json
import logging

import pytest
import transformers

from server.errors import RefusedError
from server.models.load import load_model
from server.models.recognize import read_config
from tests.models.proving import proven
from tests.models_zoo import save_tiny

CONV = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
WHOLE = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}


def serve(folder):
    return load_model(folder, "float32", "cpu", None, lambda *_: None)


def save_config(folder, kind, architecture, **values):
    config = transformers.AutoConfig.for_model(kind, **values)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    written = {name: value for name, value in {**config, **values}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("kind", "architecture", "values", "reason"),
    [
        (
            "bert",
            "BertModel",
            {},
            r"holds BertModel, an encoder: .* it gives embeddings or labels and writes no",
        ),
        ("bert", "BertForMaskedLM", {}, r"holds BertForMaskedLM, an encoder"),
        ("bert", "BertForSequenceClassification", {}, r"holds BertForSequenceClassification, an encoder"),
        ("xlm-roberta", "XLMRobertaModel", {}, r"holds XLMRobertaModel, an encoder"),
        ("roberta", "RobertaForCausalLM", {}, r"holds RobertaForCausalLM, an encoder"),
        ("distilbert", "DistilBertModel", {}, r"holds DistilBertModel, an encoder"),
        ("modernbert", "ModernBertForMaskedLM", {}, r"holds ModernBertForMaskedLM, an encoder"),
        (
            "llama",
            "LlamaForSequenceClassification",
            {},
            r"LlamaForSequenceClassification, whose output are labels or scores and no next tokens",
        ),
        ("t5", "T5ForConditionalGeneration", {}, r"^t5 is an encoder-decoder model; choose a decoder-only"),
        ("whisper", "WhisperForConditionalGeneration", {}, r"^whisper is an encoder-decoder model"),
        ("vit", "ViTModel", {}, r"^vit is no causal language model"),
        (
            "llava",
            "LlavaForConditionalGeneration",
            {},
            r"^llava is a multimodal model that transformers can't",
        ),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", {}, r"^qwen2_audio is a multimodal model that"),
        (
            "mllama_text_model",
            "MllamaForCausalLM",
            {},
            r"^mllama_text_model describes a part of a model, .* can't load MllamaForCausalLM alone",
        ),
        (
            "mamba",
            "MambaForCausalLM",
            {},
            r"in its linear_attention layers it keeps something else .* a state",
        ),
        ("rwkv", "RwkvForCausalLM", {}, r"^RwkvForCausalLM cannot be served: it keeps a state from token to"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", {}, r"keeps something else than each token's keys"),
        ("xlstm", "xLSTMForCausalLM", {}, r"^xLSTMForCausalLM cannot be served: .* keeps"),
        ("nemotron_h", "NemotronHForCausalLM", {}, r"in its linear_attention layers it keeps something else"),
        ("jamba", "JambaForCausalLM", {}, r"^JambaForCausalLM cannot be served: in its linear_attention lay"),
        ("qwen3_next", "Qwen3NextForCausalLM", {}, r"in its linear_attention layers it keeps something else"),
        (
            "deepseek_v4",
            "DeepseekV4ForCausalLM",
            {},
            r"in its compressed_\w+, .* keys that several tokens share",
        ),
        ("lfm2", "Lfm2ForCausalLM", CONV, r"^Lfm2ForCausalLM .* lose the structure of its conv layers"),
        ("llama4_text", "Llama4ForCausalLM", {}, r"lose the structure of its chunked_attention layers"),
        (
            "llama4_text",
            "Llama4ForCausalLM",
            WHOLE,
            r"scales its queries by positions that it counts in each",
        ),
        ("bloom", "BloomForCausalLM", {}, r"^BloomForCausalLM does not go through .* attention interface"),
    ],
)
def test_a_kind_that_cannot_be_served_is_named_from_its_config(kind, architecture, values, reason, tmp_path):
    with pytest.raises(RefusedError, match=reason):
        read_config(save_config(tmp_path, kind, architecture, **values))


@pytest.mark.parametrize("kind", ["granitemoehybrid", "gemma3", "got_ocr2", "stablelm"])
def test_kinds_that_look_like_those_are_not_refused(kind, tmp_path):
    """A hybrid all of whose layers attend has no state; multimodal models may leave attention to a part."""
    values = {"layer_types": ["attention"] * 2, "num_hidden_layers": 2} if kind == "granitemoehybrid" else {}
    assert read_config(save_config(tmp_path, kind, "Any", **values)).model_type == kind


def test_an_unknown_type(tmp_path):
    folder = save_config(tmp_path, "llama", "LlamaForCausalLM")
    edit(folder, model_type="unheard_of")
    with pytest.raises(RefusedError, match=r"transformers [0-9.]+ knows no model type 'unheard_of'"):
        read_config(folder)
    edit(folder, model_type="[" * 3000)
    with pytest.raises(RefusedError, match=r"knows no model type '\[{79}\.\.\.; choose"):
        read_config(folder)
    edit(folder, auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(
        RefusedError, match=r"needs Python code that comes with the checkpoint, .* never runs"
    ):
        read_config(folder)


def test_a_long_name_is_known_by_its_end_and_quoted_in_part(tmp_path):
    folder = save_config(tmp_path, "llama", "A" * 3000 + "ForSequenceClassification")
    with pytest.raises(RefusedError, match=r"holds A{80}, whose output are labels"):
        read_config(folder)


def test_a_type_that_is_not_said_is_not_guessed_from_the_folders_name(tmp_path):
    folder = save_config(tmp_path / "llama-tiny", "llama", "LlamaForCausalLM")
    edit(folder, model_type=None)
    with pytest.raises(RefusedError, match="names no model_type, so it can't be told which architecture"):
        read_config(folder)


def test_code_that_is_not_needed_is_not_run_and_that_is_said(tmp_path, caplog):
    folder = save_config(tmp_path, "llama", "LlamaForCausalLM")
    edit(folder, auto_map={"AutoModelForCausalLM": "own.Model"})
    with caplog.at_level(logging.INFO, logger="longspan.models"):
        assert read_config(folder).model_type == "llama"
    assert "is not run: transformers has llama itself" in caplog.text


def test_roberta_counts_positions_in_its_own_way(tmp_path):
    loaded = serve(save_tiny("roberta", tmp_path))
    with pytest.raises(
        RefusedError, match=r"RobertaForCausalLM cannot be served: left to itself it counts a"
    ):
        proven(loaded)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_decoder_with_another_depth_than_its_encoder(layers, tmp_path):
    depths = {"encoder_layers": layers, "decoder_layers": 2}
    with pytest.raises(
        RefusedError, match=r"BartForCausalLM cannot be served: it does not follow position_ids"
    ):
        serve(save_tiny("bart", tmp_path / "bart", **depths))
    assert len(serve(save_tiny("whisper", tmp_path / "whisper", **depths)).layers) == 2


def test_a_model_made_of_several_transformers(tmp_path):
    with pytest.raises(
        RefusedError, match="BltForCausalLM cannot be served: it is made of several transformers"
    ):
        serve(save_tiny("blt", tmp_path))


def test_unexpected_failures_are_said_in_a_sentence(tmp_path, monkeypatch):
    def stumble(model):
        raise IndexError("index 64 is\nout of bounds")

    folder = save_tiny("llama", tmp_path)
    monkeypatch.setattr("server.models.load.read_layers", stumble)
    with pytest.raises(
        RefusedError,
        match=r"^LlamaForCausalLM cannot be served: reading its layers fails with IndexError: index 64 is",
    ):
        serve(folder)
