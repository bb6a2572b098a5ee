import json
import os
import resource
from contextlib import contextmanager

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.errors import RefusedError
from server.models.convert import RECORD, convert_once
from server.models.default import FILE, SHA256
from server.models.gguf.conversion import convert
from server.models.gguf.tokenizer import read_tokenizer
from server.models.resolve import resolve_model
from server.text.tokenizer import Tokenizer
from tests.models.gguf.files import rewrite, write
from tests.models_zoo import save_tiny

pytestmark = pytest.mark.long

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleave(weight, heads):
    """GGUF keeps the two halves of every rotary head of a Llama model interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.stress)])
def test_every_weight_of_the_default_model_is_the_files_own(step, default_model):
    """Of all tensors, and of every so many rows."""
    weights = load_file(default_model / "model.safetensors")
    assert "lm_head.weight" not in weights, "tied, and stored once"
    reader = gguf.GGUFReader(str(default_model.parent / FILE))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(weights) == 272
    for name, weight in weights.items():
        tensor = tensors[gguf_name(name)]
        assert weight.dtype == torch.float32
        found = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            found = interleave(found, 9 if "q_proj" in name else 3)
        own = gguf.quants.dequantize(tensor.data[::step], tensor.tensor_type)
        assert np.array_equal(own, found[::step]), name


def test_the_default_models_record_names_the_file_with_its_4_bit_blocks(default_model):
    record = json.loads((default_model / RECORD).read_text())
    assert record["gguf"] == str((default_model.parent / FILE).resolve())
    assert (record["sha256"], record["size"]) == (SHA256, 98_362_432)


def test_the_default_models_tokenizer(default_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model)
    text = "Grüße, naïve 東京 🙂\n\n  def f(x):\treturn x**2  # it's 1234.5\r\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(token < 49152 for token in ids)
    # Facts about SmolLM2's own tokenizer: digits one by one, a space joins its word, no token is added.
    assert tokenizer.tokenize("In 2024 there were") == ["In", "Ġ", "2", "0", "2", "4", "Ġthere", "Ġwere"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]
    assert tokenizer("")["input_ids"] == []
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # <|endoftext|> ends generation beside the file's own token, since llama.cpp knows it by its text.
    assert transformers.GenerationConfig.from_pretrained(default_model).eos_token_id == [2, 0]
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    ) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ours = Tokenizer(default_model)
    assert ours.eos_token == "<|im_end|>"
    assert ours.encode(text) == ids


def write_gguf(folder, file, *, pre="gpt-2"):
    """The tiny Llama model in ``folder`` as a GGUF file; its weights must fit 16 bits."""
    plain = write(folder, file.with_suffix(".plain"), "llama")
    kinds = {
        tensor.name: gguf.GGMLQuantizationType.F16
        for tensor in gguf.GGUFReader(plain).tensors
        if len(tensor.shape) > 1
    }
    return rewrite(plain, file, keys={"tokenizer.ggml.pre": pre}, kinds=kinds)


@pytest.fixture
def half(tmp_path):
    """A tiny Llama model whose weights are float16 numbers."""
    folder = save_tiny("llama", tmp_path / "llama")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    return folder


def test_a_file_is_converted_once_by_its_content(half, tmp_path):
    file, cache = write_gguf(half, tmp_path / "Tiny.F16.gguf"), tmp_path / "cache"
    told = []
    found = resolve_model(str(file), cache, lambda stage, fraction: told.append(stage))
    assert (found.name, found.source) == ("tiny.f16", str(file))
    assert told[-1] == "converting Tiny.F16.gguf: writing"

    before, after = load_file(half / "model.safetensors"), load_file(found.folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == torch.float16
        assert torch.equal(after[name], weight), name
    ids = transformers.AutoTokenizer.from_pretrained(half)("a text, 12<|end|>")["input_ids"]
    assert Tokenizer(found.folder).encode("a text, 12<|end|>") == [0, *ids], "the file asks for a first token"

    def refuse(stage, fraction):
        raise AssertionError(stage)

    assert resolve_model(str(file), cache, refuse) == found
    moved = file.rename(tmp_path / "moved.gguf")
    read_again = []
    same = convert_once(
        moved, "tiny.f16", str(moved), cache, lambda stage, fraction: read_again.append(stage)
    )
    assert (same, read_again) == (found.folder, ["reading moved.gguf"])
    assert convert_once(moved, "tiny.f16", str(moved), cache, refuse) == same
    state, content = moved.stat(), bytearray(moved.read_bytes())
    content[-2] ^= 0x80
    moved.write_bytes(content)
    os.utime(moved, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(AssertionError, match=r"reading moved\.gguf"):
        convert_once(moved, "tiny.f16", str(moved), cache, refuse)


def test_a_file_that_cannot_be_converted_is_refused_with_its_reason(half, tmp_path, conversions_here):
    file = write_gguf(half, tmp_path / "strange.gguf", pre="strange")
    with pytest.raises(ValueError, match=r"how its tokenizer cuts text .strange. is unknown"):
        convert(file, tmp_path / "strange")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(RefusedError, match=r"cut\.gguf can't be converted: .*Hugging Face folder"):
        resolve_model(str(tmp_path / "cut.gguf"), tmp_path / "cache", lambda *_: None)
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


@contextmanager
def room_for(size):
    """Every file of this process and of its children ends after so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_not_blamed_on_the_file(half, tmp_path, capsys, conversions_here):
    """There is no room for the tokenizer, or for the weights: the program's end says so, and its caller."""
    file = write_gguf(half, tmp_path / "tiny.gguf")
    for room, made in ((2000, False), (40_000, True)):
        folder = tmp_path / str(room)
        with room_for(room), pytest.raises(SystemExit) as ended:
            convert(file, folder)
        assert ended.value.code == os.EX_IOERR
        assert "File too large" in capsys.readouterr().err
        assert (folder / "config.json").exists() == made
    refusal = r"models can't hold the model \(.*File too large.*\); make room"
    with room_for(2000), pytest.raises(RefusedError, match=refusal):
        resolve_model(str(file), tmp_path / "cache", lambda *_: None)
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("pre", "cut", "first"),
    [
        ("gpt-2", ["In", " 2024", " it", "'s", "\n\n ", " X", "!"], []),
        ("smollm", ["In", " ", "2", "0", "2", "4", " it", "'s", "\n\n ", " X", "!"], []),
        ("llama-bpe", ["In", " ", "202", "4", " it", "'s", "\n\n", " ", " X", "!"], ["<s>"]),
        ("qwen2", ["In", " ", "2", "0", "2", "4", " it", "'s", "\n\n", " ", " X", "!"], []),
        ("tekken", ["In", " ", "2", "0", "2", "4", " it", "'s", "\n\n", " ", " X", "!"], ["<s>"]),
        ("gpt-4o", ["In", " ", "202", "4", " it's", "\n\n", " ", " X", "!"], []),
    ],
)
def test_text_is_cut_as_the_file_says(pre, cut, first, tmp_path):
    alphabet = bytes_to_unicode()
    tokens = ["<s>", *alphabet.values()]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": [],
        "token_type": [3] + [1] * 256,
        "bos_token_id": 0,
    }
    tokenizer = read_tokenizer(
        tmp_path / "x.gguf", {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    )
    text = "In 2024 it's\n\n  X!"
    backend = tokenizer.backend_tokenizer
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in spans] == cut
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[: len(first)]) == first
    assert tokenizer.decode(ids[len(first) :]) == text
