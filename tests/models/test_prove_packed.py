"""Packed layers are proven strictly: every part that one of them loses is noticed, and rounding is not."""

import copy
import dataclasses

import pytest
import torch

from server.errors import RefusedError
from server.models.fused import Norm
from server.models.lay_out import lay_out
from server.models.load import load_model
from server.models.pack_model import pack_model
from server.models.prove_packed import prove_head, prove_layer, prove_linear, prove_stack
from server.models.quantized import native
from server.models.quantized.embedding import QuantizedEmbedding
from server.models.quantized.layer import LayerParts, QuantizedLayer
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import QuantizedModel
from server.models.quantized.packing import pack, unpack
from server.models.quantized.rotary import OwnRotary
from server.models.quantized.stack import QuantizedStack
from server.models.quantized.workspace import Workspace
from server.models.recognize_layers import recognize_layers
from tests.cover import every_value
from tests.instructions import at, every_level, with_matrix_unit
from tests.models_zoo import CONTEXT, save_tiny

BIASES = {"attention_bias": True, "mlp_bias": True}


def floats(folder, kind="llama", **config):
    return load_model(save_tiny(kind, folder, **config), "float32", "cpu", None, lambda *_: None)


def layer_of(folder, kind="llama", bits=8, **config):
    """A recognized layer, its packed parts, and rotary angles."""
    recognized = recognize_layers(floats(folder, kind, **config).model).layers[1]
    fused = recognized.fused
    linears = [
        QuantizedLinear(pack(linear.weight, bits), linear.in_features, linear.out_features, linear.bias)
        for linear in (fused.qkv, fused.o, fused.gate_up, fused.down)
    ]
    parts = LayerParts(
        fused.layer_idx,
        fused.features,
        (fused.query_heads, fused.kv_heads, fused.head_size),
        [fused.attention_norm, fused.mlp_norm, *fused.head_norms],
        linears,
    )
    return fused, parts, tuple(part[0] for part in recognized.angles)


SAME = [
    ("llama", BIASES),
    ("llama", {"hidden_size": 40, "intermediate_size": 77, "head_dim": 10}),
    ("llama", {"hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}),
    ("qwen2", {}),
    ("qwen3", {}),
]


@every_level
@every_value(same=SAME, bits=[4, 8])
def test_layers_that_compute_the_same_pass(level, same, bits, tmp_path):
    kind, config = same
    with at(level):
        fused, parts, angles = layer_of(tmp_path, kind, bits, **config)
        prove_layer(fused, QuantizedLayer(parts, Workspace()), angles)


def without_bias(linear, at=slice(None)):
    """The same linear layer, of whose biases some are lost."""
    lost = copy.deepcopy(linear)
    lost.bias[at] = 0
    return lost


def scaled(norm, by):
    other = copy.deepcopy(norm)
    other.weight.mul_(by)
    return other


def with_epsilon(norm, epsilon):
    other = copy.deepcopy(norm)
    other.epsilon = epsilon
    return other


LOST = {
    "a query's bias": ("qkv", {"linears": {0: lambda linear: without_bias(linear, 3)}}),
    "a value's bias": ("qkv", {"linears": {0: lambda linear: without_bias(linear, -1)}}),
    "o's bias": ("the attention output", {"linears": {1: without_bias}}),
    "one bias of gate": ("gate and up", {"linears": {2: lambda linear: without_bias(linear, 7)}}),
    "down's bias": ("the MLP output", {"linears": {3: without_bias}}),
    "a norm's weight": ("queries, keys and values", {"norms": {0: lambda norm: scaled(norm, 1.001)}}),
    "a norm's epsilon": ("queries, keys and values", {"norms": {0: lambda norm: with_epsilon(norm, 2e-6)}}),
    "the MLP's norm": ("gate and up", {"norms": {1: lambda norm: scaled(norm, 1.001)}}),
    "the MLP's epsilon": ("gate and up", {"norms": {1: lambda norm: with_epsilon(norm, 2e-6)}}),
    "a query's norm": ("queries, keys and values", {"norms": {2: lambda norm: scaled(norm, 1.001)}}),
    "a key's norm": ("queries, keys and values", {"norms": {3: lambda norm: scaled(norm, 1.001)}}),
    "the order of head norms": ("queries, keys and values", {"order": [0, 1, 3, 2]}),
    "the order of norms": ("queries, keys and values", {"order": [1, 0, 2, 3]}),
}


@pytest.mark.parametrize("name", LOST)
def test_a_part_that_a_packed_layer_loses_is_noticed(name, tmp_path):
    kind = "qwen3" if "norm" in name and "bias" not in name else "llama"
    config = {} if kind == "qwen3" else BIASES
    stage, change = LOST[name]
    fused, parts, angles = layer_of(tmp_path, kind, **config)
    prove_layer(fused, QuantizedLayer(parts, Workspace()), angles)
    linears, norms = list(parts.linears), list(parts.norms)
    for index, edit in change.get("linears", {}).items():
        linears[index] = edit(linears[index])
    for index, edit in change.get("norms", {}).items():
        norms[index] = edit(norms[index])
    norms = [norms[index] for index in change.get("order", range(len(norms)))]
    wrong = QuantizedLayer(parts._replace(linears=linears, norms=norms), Workspace())
    stage = "queries, keys and values" if stage == "qkv" else stage
    with pytest.raises(RefusedError, match=rf"{stage}.* layer 1 computes .*; choose --weights float"):
        prove_layer(fused, wrong, angles)


@pytest.mark.parametrize(
    ("stage", "changed", "said"),
    [
        (1, {"added": 0}, "the attention output"),
        (3, {"added": 0}, "the MLP output"),
        (0, {"query_heads": 3}, "queries, keys and values"),
        (0, {"kv_heads": 1}, "queries, keys and values"),
        (2, {"norm": None}, "gate and up"),
    ],
    ids=["residual", "the MLP's residual", "a rotated query", "a rotated key", "norm"],
)
def test_a_stage_that_does_something_else_is_noticed(stage, changed, said, tmp_path):
    fused, parts, angles = layer_of(tmp_path)
    layer = QuantizedLayer(parts, Workspace())
    for name, value in changed.items():
        setattr(layer.stages[stage], name, value)
    with pytest.raises(RefusedError, match=f"{said}.* layer 1 computes something else"):
        prove_layer(fused, layer, angles)


def test_rotary_angles_of_another_position_are_noticed(tmp_path):
    fused, parts, (cosines, sines) = layer_of(tmp_path)
    layer = QuantizedLayer(parts, Workspace())
    shifted = torch.tensor([0, 1, 1, 3])
    layer.stages[0].positions = shifted.data_ptr()
    prove_layer(fused, layer, (cosines, sines))  # without positions each row has its own
    run = native.run

    def moved(stages, rows, given):
        if stages[0].cosines:
            stages[0].positions = shifted.data_ptr()
        run(stages, rows, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.models.prove_packed.run", moved)
        with pytest.raises(RefusedError, match="queries, keys and values of layer 1"):
            prove_layer(fused, layer, (cosines, sines))


@with_matrix_unit
def test_a_product_of_prompts_by_other_weights_is_noticed(level, tmp_path):
    fused, parts, angles = layer_of(tmp_path)
    layer, run = QuantizedLayer(parts, Workspace()), native.run
    down = parts.linears[3]
    codes = down.codes.clone()
    codes[0, 0, 0] ^= 1  # of one weight

    def mistaken(stages, rows, given):
        if given is not None and stages[0].codes == down.codes.data_ptr():
            stages[0].codes = codes.data_ptr()
        run(stages, rows, given)

    with at(level), pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.models.prove_packed.run", mistaken)
        with pytest.raises(RefusedError, match="a product of prompts of layer 1"):
            prove_layer(fused, layer, angles)


def test_a_gate_that_is_lost_is_noticed(tmp_path):
    """Another activation than SiLU, which the operator does not know."""
    fused, parts, angles = layer_of(tmp_path, hidden_act="gelu")
    with pytest.raises(RefusedError, match="the MLP output of layer 1"):
        prove_layer(fused, QuantizedLayer(parts, Workspace()), angles)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(48, 64), (5, 31), (4100, 96)])
def test_a_linear_layer_is_proven_weight_by_weight(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    packed = QuantizedLinear(pack(weight, bits), shape[1], shape[0], bias)
    prove_linear(weight, bias, packed)
    with pytest.raises(RefusedError, match="a linear layer computes something else"):
        prove_linear(weight, None, packed)
    exact = QuantizedLinear(dataclasses.replace(pack(weight, bits), exact=True), shape[1], shape[0], bias)
    with pytest.raises(RefusedError, match="a linear layer computes something else"):
        prove_linear(weight, bias, exact)  # it is not


def test_the_output_layer_is_proven_with_its_norm():
    plain = torch.nn.Linear(64, 320, bias=False)
    norm = Norm(torch.nn.RMSNorm(64, 1e-5))
    packed = QuantizedLinear(pack(plain.weight, 8), 64, 320, None)
    with torch.inference_mode():
        prove_head(norm, plain, packed)
        plain.weight[17] *= 1.01
        prove_head(norm, plain, packed)  # the codes were rounded: they stand for the weights as they were
        with pytest.raises(RefusedError, match="the output layer computes something else"):
            prove_head(
                norm,
                plain,
                QuantizedLinear(dataclasses.replace(pack(plain.weight, 8), exact=True), 64, 320, None),
            )


def test_all_layers_in_turn_are_proven_to_the_last_bit(tmp_path):
    loaded = floats(tmp_path)
    recognition = recognize_layers(loaded.model)
    packed, forms = pack_model(loaded, recognition, "int8")
    assert forms == "int8"
    stack, angles = packed.model.decoder, packed.model.rotary.at(recognition.positions)
    hidden = recognition.layers[0].input[0]
    prove_stack(stack, hidden, angles)
    prove_stack(QuantizedStack(list(stack.layers)), hidden, angles)
    backwards = QuantizedStack(list(stack.layers)[::-1])
    backwards.layers = stack.layers
    with pytest.raises(RefusedError, match="all layers in turn computes something else than each by itself"):
        prove_stack(backwards, hidden, angles)


def scale_input(module, args):
    return args[0] * 1.01, *args[1:]


def scale_output(module, args, output):
    return (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ("layers.0", "something is computed between its embedding and its layers"),
        ("norm", "something is computed after its last norm or its output layer"),
        ("rotary_emb", "its rotary angles are not those of a table"),
    ],
)
def test_computation_between_the_parts_is_noticed(part, why, tmp_path, caplog):
    """Like the multipliers of Granite, or a soft-cap on the logits."""
    loaded = floats(tmp_path)
    module = loaded.model.model.get_submodule(part)
    if part == "layers.0":
        module.register_forward_pre_hook(scale_input)
    else:
        module.register_forward_hook(scale_output)
    assert why in pack_model(loaded, recognize_layers(loaded.model), "int8")
    with caplog.at_level("INFO", "longspan.models"):
        assert why in lay_out(loaded, "int8", lambda _: None)[0].unpacked
    assert f"LlamaForCausalLM is not one packed model: {why}" in caplog.text


def test_an_embedding_that_does_more_than_to_look_up_is_not_packed(tmp_path):
    folder = save_tiny("llama", tmp_path, tie_word_embeddings=True)
    loaded = load_model(folder, "float32", "cpu", None, lambda *_: None)
    embedding = loaded.model.get_input_embeddings()
    embedding.weight.copy_(unpack(pack(embedding.weight, 8), *embedding.weight.shape))
    recognition = recognize_layers(loaded.model)
    packed, _ = pack_model(loaded, recognition, "int8")
    assert isinstance(packed.model.embedding, QuantizedEmbedding)
    embedding.register_forward_hook(scale_output)
    assert "its embedding does more than to look up" in pack_model(
        loaded, recognize_layers(loaded.model), "int8"
    )


def test_the_model_stays_as_it_was(tmp_path):
    loaded = floats(tmp_path)
    before = {name: type(module) for name, module in loaded.model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in loaded.model.named_parameters()}
    packed, _ = pack_model(loaded, recognize_layers(loaded.model), "int4")
    assert isinstance(packed.model, QuantizedModel)
    assert {name: type(module) for name, module in loaded.model.named_modules()} == before
    assert all(torch.equal(tensors[name], now) for name, now in loaded.model.named_parameters())


def test_frequencies_by_length_are_the_models_own(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    loaded = floats(tmp_path, max_position_embeddings=CONTEXT, rope_parameters=rope)
    packed, _ = pack_model(loaded, recognize_layers(loaded.model), "int8")
    assert isinstance(packed.model.rotary, OwnRotary)
    assert packed.rope is loaded.rope is not None
