import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from server.models.gguf.conversion import convert
from server.models.gguf.file import GgufFile
from tests.models.gguf.files import close, rewrite, write
from tests.models.gguf.zoo import CASES, save


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(CASES["llama"], folder / "model")
    return write(folder / "model", folder / "llama.gguf", "llama")


def convert_with(source, folder, **changes):
    convert(rewrite(source, folder / "changed.gguf", **changes), folder / "converted")
    return load_file(folder / "converted" / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.something_new", 3),
        ("llama.attention.temperature_scale", 0.5),
        ("llama.logit_scale", 2.0),
        ("llama.attention.scale", 0.1),
        ("llama.rope.scaling.alpha", 1000.0),
        ("something.else", True),
    ],
)
def test_a_key_that_is_not_read_refuses_the_file_by_name(llama, tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"it says {key} = {value}, and what that means for a llama"):
        convert_with(llama, tmp_path, keys={key: value})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("llama.attention.causal", False, "llama.attention.causal is False; Longspan computes it with True"),
        ("llama.attention.value_length", 4, "keys and values differ in size"),
        ("llama.rope.dimension_count", 4, "it rotates 4 of 8 numbers per head"),
        ("llama.rope.scaling.type", "dynamic", "scaling of positions, 'dynamic', is unknown"),
        ("llama.rope.scaling.attn_factor", 1.5, r"llama.rope.scaling.attn_factor"),
        ("llama.attention.head_count_kv", [2, 4], "layers differ in llama.attention.head_count_kv"),
        ("llama.vocab_size", 12, "vocabulary has 12 tokens, but token_embd.weight has 320"),
        ("llama.block_count", None, "it does not say llama.block_count"),
        (
            "llama.block_count",
            2**31 - 1,
            "says that it has 2147483647 layers, but it has only 21 tensors",
        ),
        ("general.type", "mmproj", "it holds no model but what it calls 'mmproj'"),
        ("split.count", 2, "part 1 of 2; give the files of a split set the names"),
    ],
)
def test_a_key_that_cannot_be_honored_refuses_the_file(llama, tmp_path, key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert_with(llama, tmp_path, keys={key: value})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("tokenizer.ggml.add_bos_token", "false", "true or false"),
        ("tokenizer.chat_template", 5, "a text"),
        ("tokenizer.ggml.merges", [1, 2], "a list, each of a text"),
        ("tokenizer.ggml.suppress_tokens", 5, "a list, each of a whole number"),
        ("general.sampling.temp", "0.2", "a finite number"),
        ("general.sampling.top_p", float("nan"), "a finite number"),
        (
            "llama.attention.sliding_window_pattern",
            "abc",
            "a whole number of at least 0, or true or false .*",
        ),
        ("llama.attention.sliding_window_pattern", ["a", "b"], "a whole number of at least 0, or .*"),
        ("llama.context_length", 0, "a whole number of at least 1"),
        ("llama.feed_forward_length", "48", "a whole number of at least 0"),
        ("llama.rope.freq_base", 0.0, "a finite number above 0"),
        ("llama.attention.layer_norm_rms_epsilon", float("inf"), "a finite number of at least 0"),
        ("llama.rope.scaling.factor", float("nan"), "a finite number of at least 0"),
    ],
)
def test_a_value_of_another_kind_refuses_the_file(llama, tmp_path, key, value, kind):
    with pytest.raises(ValueError, match=rf"its {key} is .*; it must be {kind}$"):
        convert_with(llama, tmp_path, keys={key: value})


def test_flags_that_are_numbers_and_lists_of_one_value_are_understood(llama, tmp_path):
    keys = {"tokenizer.ggml.add_bos_token": 1, "llama.feed_forward_length": [48, 48]}
    assert convert_with(llama, tmp_path, keys=keys)


@pytest.mark.parametrize("used", [0, 5])
def test_more_experts_than_there_are_refuse_the_file(tmp_path, used):
    save(CASES["mixtral"], tmp_path / "model")
    file = write(tmp_path / "model", tmp_path / "mixtral.gguf", "llama")
    with pytest.raises(ValueError, match=rf"a token is seen by {used} of 4 experts"):
        convert_with(file, tmp_path, keys={"llama.expert_used_count": used})


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)},
            r"it has the tensor blk\.0\.attn_sinks\.weight, ",
        ),
        (
            {"blk.2.attn_q.weight": np.zeros((32, 32), np.float32)},
            r"it has the tensor blk\.2\.attn_q\.weight, ",
        ),
        ({"blk.1.ffn_up.weight": None}, r"it has no tensor blk\.1\.ffn_up\.weight, which llama models"),
        (
            {"token_embd.weight": np.zeros((319, 32), np.float32)},
            r"has 320 tokens, but token_embd\.weight only 319",
        ),
        ({"token_embd.weight": None}, r"it has no tensor token_embd\.weight"),
        (
            {"blk.0.attn_k.weight": np.zeros((32, 32), np.float32)},
            r"tensor blk\.0\.attn_k\.weight \(32, 32\) has another shape .* \(16, 32\)",
        ),
        (
            {"rope_freqs.weight": np.full(4, np.nan, np.float32)},
            r"rope_freqs\.weight divides positions by numbers that are not above 0",
        ),
        (
            {f"rope_factors_{each}.weight": np.zeros(4, np.float32) for each in ("long", "short")},
            r"rope_factors_long\.weight divides positions by numbers that are not above 0",
        ),
        (
            {"rope_freqs.weight": np.full(3, 2.0, np.float32)},
            r"rope_freqs\.weight has 3 numbers instead of 4",
        ),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_shape_refuses_the_file(llama, tmp_path, tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert_with(llama, tmp_path, tensors=tensors)


def test_keys_known_to_say_nothing_are_accepted(llama, tmp_path):
    convert(llama, tmp_path / "own")
    own = load_file(tmp_path / "own" / "model.safetensors")
    keys = {"llama.expert_used_count": 0, "llama.logit_scale": 0.0, "quantize.imatrix.file": "x"}
    tensors = {"blk.0.attn_rot_embd.weight": np.ones(4, np.float32), "v.patch.weight": np.ones(4, np.float32)}
    found = convert_with(llama, tmp_path, keys=keys, tensors=tensors)
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)


def test_keys_of_other_converters_are_accepted(llama, tmp_path):
    """Ollama's, and yarn that does not scale."""
    roles = ("unknown", "padding", "seperator", "cls", "mask")
    keys = {
        **{f"tokenizer.ggml.add_{role}_token": False for role in roles},
        "tokenizer.ggml.eos_token_ids": [2, 5],
        "llama.attention.head_dim": 8,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.yarn_beta_fast": 32.0,
    }
    assert convert_with(llama, tmp_path, keys=keys)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "converted").eos_token_id == [2, 5]
    for key, value, sentence in (
        ("tokenizer.ggml.add_mask_token", True, "where it adds a token to texts"),
        ("llama.attention.head_dim", 16, "llama.attention.head_dim is 16; Longspan computes it with 8"),
        ("tokenizer.ggml.eos_token_ids", [2, 320], "eos_token_ids is 320; its vocabulary has the"),
    ):
        with pytest.raises(ValueError, match=sentence):
            convert_with(llama, tmp_path, keys={key: value})


def test_an_unknown_architecture_is_refused_with_those_that_are_known(llama, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "newest")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"its architecture, newest, is none of those .*: cohere2, .* starcoder2"
    ):
        convert(tmp_path / "x.gguf", tmp_path / "x")


def test_a_file_that_is_cut_short_says_so(llama, tmp_path):
    content = llama.read_bytes()
    for length in (len(content) - 64, 5000, 30):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is cut short or damaged \(.*\); fetch it again"):
            convert(tmp_path / "cut.gguf", tmp_path / "cut")


def test_a_list_of_absurd_length_ends_with_the_file(llama, tmp_path):
    keys = {"llama.attention.sliding_window_pattern": [True] * 3}
    content = rewrite(llama, tmp_path / "x.gguf", keys=keys).read_bytes()
    key = b"sliding_window_pattern"
    at = content.index(key) + len(key) + 4 + 4
    (tmp_path / "x.gguf").write_bytes(content[:at] + (1 << 60).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(ValueError, match=r"x\.gguf is cut short or damaged \(it ends too early\); fetch it"):
        convert(tmp_path / "x.gguf", tmp_path / "x")


def test_a_tensor_out_of_its_place_is_damage(llama, tmp_path):
    content = llama.read_bytes()
    at = content.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 2 * 8 + 4
    (tmp_path / "x.gguf").write_bytes(content[:at] + (64).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(ValueError, match=r"its tensor blk\.0\.ffn_down\.weight does not begin where"):
        convert(tmp_path / "x.gguf", tmp_path / "x")


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_tensors_may_be_aligned_in_other_ways(llama, tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(alignment)
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(llama).tensors}
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    file = GgufFile(close(writer, tmp_path / "x.gguf"))
    assert all(np.array_equal(file.read(name).numpy(), data) for name, data in tensors.items())


def test_tokens_that_are_no_text_are_named(llama, tmp_path):
    content = llama.read_bytes()
    assert content.count(b"<|start|>") == 1
    (tmp_path / "x.gguf").write_bytes(content.replace(b"<|start|>", b"<|sta\xff\xff|>"))
    with pytest.raises(
        ValueError, match=r"its tokenizer\.ggml\.tokens has text that is not UTF-8 \(b'<\|sta"
    ):
        convert(tmp_path / "x.gguf", tmp_path / "x")


def test_a_type_of_blocks_that_cannot_be_read_is_refused_by_name(llama, tmp_path):
    content = llama.read_bytes()
    at = content.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 2 * 8
    for number, sentence in (
        (26, "tensor blk.0.ffn_down.weight is stored as I32, which"),
        (250, r"a type that this version of the gguf package does not know .*250"),
    ):
        (tmp_path / "x.gguf").write_bytes(content[:at] + number.to_bytes(4, "little") + content[at + 4 :])
        with pytest.raises(ValueError, match=sentence):
            convert(tmp_path / "x.gguf", tmp_path / "x")


def test_layers_that_draft_tokens_are_left_out(tmp_path):
    model = save(CASES["glm4"], tmp_path / "model")
    file = write(tmp_path / "model", tmp_path / "glm4.gguf", "glm4")
    extra = {
        f"blk.2.{name}": np.ones((32, 64), np.float32) for name in ("nextn.eh_proj.weight", "attn_q.weight")
    }
    keys = {"glm4.block_count": 3, "glm4.nextn_predict_layers": 1}
    weights = convert_with(file, tmp_path, keys=keys, tensors=extra)
    assert weights.keys() == model.state_dict().keys()
    with pytest.raises(
        ValueError, match=r"it has the tensor blk\.2\.nextn\.eh_proj\.weight, .* \(1 more like this\)"
    ):
        convert_with(file, tmp_path, keys={"glm4.nextn_predict_layers": 0}, tensors=extra)


def test_the_name_that_people_gave_decides_nothing(llama, tmp_path):
    convert_with(llama, tmp_path, keys={"general.name": "mistral"})
    assert transformers.AutoConfig.from_pretrained(tmp_path / "converted").model_type == "llama"
