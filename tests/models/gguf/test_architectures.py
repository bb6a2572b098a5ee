import pytest
import torch
import transformers

from server.models.gguf.conversion import convert
from tests.models.gguf.files import write
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
