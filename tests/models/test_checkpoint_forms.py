import importlib.util
import logging

import pytest
import torch

from attention.backends import resolve
from server.engine.types import RefusedError
from server.models.check import self_check
from server.models.folder import check_folder
from server.models.load import load_model
from tests.models.checkpoint_forms import FORMS
from tests.models.form import EXACT, edited, put


def serve(folder, dtype="auto"):
    check_folder(folder)
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
    self_check(loaded, resolve("full", {}, "auto", loaded.layers, "cpu", loaded.dtype, 16), 16, loaded.dtype)
    loaded.model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def test_what_is_not_used_is_said_with_its_reason(tmp_path, caplog):
    form = next(form for form in FORMS if form.name == "position ids")
    form.write(tmp_path / "model")
    with caplog.at_level(logging.INFO, "longspan.models"):
        serve(tmp_path / "model")
    assert "1 weights are not used, model.position_ids among them: positions are counted" in caplog.text


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_that_the_config_denies_is_said(tied, tmp_path, caplog):
    name = "tied embeddings, and another output head in the file" if tied else "float64 weights"
    next(form for form in FORMS if form.name == name).write(tmp_path / "model")
    serve(tmp_path / "model")
    assert ("tie_word_embeddings" in caplog.text) == tied


def test_weights_beyond_half_precision_are_named_with_another_choice(tmp_path):
    edited(lambda tensors: put(tensors, 1e5, (3, 3)))(tmp_path / "model")
    with pytest.raises(RefusedError, match=r"down_proj.* has 1 non-finite .*; choose --dtype bfloat16 or"):
        serve(tmp_path / "model", "float16")
    assert serve(tmp_path / "model", "bfloat16").dtype == torch.bfloat16
