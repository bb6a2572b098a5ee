import pytest
import torch
import transformers

from server.models.gguf.conversion import convert
from tests.models.gguf.files import rewrite, write
from tests.models.gguf.zoo import CASES, LENGTH, ORIGINAL, save


def log_probabilities(model, length):
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


def assert_same_answers(model, folder):
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    for length in (ORIGINAL - 1, LENGTH):
        torch.testing.assert_close(
            log_probabilities(found.eval(), length), log_probabilities(model, length), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("name", CASES)
def test_a_file_computes_what_its_model_did(name, tmp_path):
    model = save(CASES[name], tmp_path / "model")
    file = write(tmp_path / "model", tmp_path / "model.gguf", CASES[name].architecture, CASES[name].keys)
    convert(file, tmp_path / "converted")
    assert_same_answers(model, tmp_path / "converted")


_PLAIN = [
    name
    for name, case in CASES.items()
    if case.config.get("rope_parameters", {}).get("rope_type", "default") == "default" and case.kind != "gpt2"
]


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("name", _PLAIN)
def test_every_architecture_scales_its_positions_or_says_that_it_cannot(name, kind, tmp_path):
    case = CASES[name]
    save(case, tmp_path / "model")
    file = write(tmp_path / "model", tmp_path / "model.gguf", case.architecture, case.keys)
    said = {"type": kind, "factor": 4.0, "original_context_length": ORIGINAL}
    keys = {f"{case.architecture}.rope.scaling.{key}": value for key, value in said.items()}
    scaled = rewrite(file, tmp_path / "scaled.gguf", keys=keys)
    if case.kind == "phi3":
        with pytest.raises(ValueError, match="a phi3 model of transformers can't compute what it says"):
            convert(scaled, tmp_path / "converted")
        return
    convert(scaled, tmp_path / "converted")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    rope |= {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = ORIGINAL
    if getattr(config, "head_dim", 0) is None:  # yarn of transformers fails on what means the usual size
        config.head_dim = config.hidden_size // config.num_attention_heads
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    assert_same_answers(own.eval(), tmp_path / "converted")
