import importlib.util
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from server.errors import RefusedError
from server.models.folder import check_folder
from server.models.load import load_model
from tests.models.checkpoint_forms import FORMS
from tests.models.form import EXACT, edited, put
from tests.models.proving import proven


def serve(folder, dtype="auto"):
    check_folder(folder, pickles=True)
    return load_model(folder, dtype, "cpu", None, lambda stage, fraction: None)


def logits(model):
    ids = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_served_exactly_or_refused_with_its_reason(form, tmp_path):
    model = form.write(tmp_path / "model")
    expected = form.expected
    if form.needs and importlib.util.find_spec(form.needs.replace("-", "_")) is None:
        expected = f"package {form.needs} is not installed; pip install {form.needs}"
    if expected != EXACT:
        with pytest.raises(RefusedError, match=expected) as refusal:
            serve(tmp_path / "model")
        assert "report" not in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return
    loaded = serve(tmp_path / "model")
    loaded.model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)
    loaded.model.set_attn_implementation("longspan")
    proven(loaded, page_size=16)


def test_unused_tensors_are_logged_with_the_reason(tmp_path, caplog):
    form = next(form for form in FORMS if form.name == "position ids")
    form.write(tmp_path / "model")
    with caplog.at_level(logging.INFO, "longspan.models"):
        serve(tmp_path / "model")
    assert "weights not used: 1, model.position_ids among them: positions are counted" in caplog.text


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_that_the_config_denies_is_said(tied, tmp_path, caplog):
    name = "tied embeddings, and another output head in the file" if tied else "float64 weights"
    next(form for form in FORMS if form.name == name).write(tmp_path / "model")
    serve(tmp_path / "model")
    assert ("tie_word_embeddings" in caplog.text) == tied


@pytest.mark.parametrize(("kind", "optional"), [("deepseek_v3", False), ("axk1", True)])
def test_corrections_of_experts_may_miss_only_where_transformers_says_so(kind, optional, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    parts = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, **heads, **parts, **layers, topk_group=1, num_experts_per_tok=2, pad_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if optional:
        serve(tmp_path)
        return
    with pytest.raises(RefusedError, match=r"1 is missing, .*e_score_correction_bias"):
        serve(tmp_path)


def test_weights_beyond_half_precision_are_named_with_another_dtype(tmp_path):
    edited(lambda tensors: put(tensors, 1e5, (3, 3)))(tmp_path / "model")
    with pytest.raises(RefusedError, match=r"down_proj.* has 1 non-finite .*; choose --dtype bfloat16 or"):
        serve(tmp_path / "model", "float16")
    assert serve(tmp_path / "model", "bfloat16").dtype == torch.bfloat16
