"""ANNalog, a trained encoder-decoder: converted without loss, and served as transformers computes it."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from server.errors import RefusedError
from server.models import annalog, annalog_convert
from server.models.resolve import list_cached, resolve_model
from server.settings import Settings
from tests.e2e.here import serving
from tests.encoder_decoders.harness import generated, load, own_model
from tests.wheels import only_here, write_wheel

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
TEXTS = [ASPIRIN, "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "C[C@H](N)C(=O)O"]
SIZE, HEADS, INNER, LAYERS = 256, 8, 512, 3


def silent(stage, fraction):
    pass


@pytest.fixture(scope="module")
def folder():
    """The real model's, in the ordinary cache: fetched once per machine."""
    return resolve_model("annalog", Settings().cache_dir, silent).folder


@pytest.fixture(scope="module")
def client(folder):
    with serving(model="annalog", threads=1, kv_memory="16MiB") as server, server.client() as client:
        yield client


def test_it_is_served_as_in_transformers(client, folder):
    own, tokenizer = own_model(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        answer = client.generate(text)
        assert list(answer.completions[0].token_ids) == generated(own, ids, 101)
        assert answer.completions[0].text == "".join(delta.text for delta in client.stream(text))
    searched = client.generate(ASPIRIN, num_beams=5, n=4)
    with torch.no_grad():
        rows = own.generate(
            torch.tensor([tokenizer.encode(ASPIRIN).ids]), num_beams=5, num_return_sequences=4, max_length=102
        )
    expected = tokenizer.decode_batch(rows.tolist())
    assert [one.text for one in searched.completions] == expected
    # What it learned: the likeliest have the molecule itself, and its acid at the next place of the ring.
    assert {ASPIRIN, "CC(=O)Oc1cccc(C(=O)O)c1"} < set(expected)


def test_it_is_listed_where_it_lies(folder):
    listed = {one.name: one for one in list_cached(Settings().cache_dir)}
    assert listed["annalog"].folder == folder


def test_its_tokenizer_cuts_as_its_makers_do(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut = ["<sos>", "C", "[C@@H]", "(", "Br", ")", "c", "%10", "Cl", "[S@@+]", "<eos>"]
    assert tokenizer.encode("C[C@@H](Br)c%10Cl[S@@+]").tokens == cut
    assert tokenizer.decode(tokenizer.encode("C[C@@H](Br)c%10Cl[S@@+]").ids) == "C[C@@H](Br)c%10Cl[S@@+]"
    assert tokenizer.encode("C [Xx]").tokens == ["<sos>", "C", "<unk>", "<unk>", "<eos>"]


def test_conversion_is_without_loss(tmp_path):
    """Random weights by ANNalog's names: torch's own Transformer layers give the logits of the folder."""
    torch.manual_seed(0)
    state = random_state()
    torch.save(state, tmp_path / "weights.pt")
    annalog_convert.convert(tmp_path / "weights.pt", tmp_path / "model")
    converted = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    source, target = torch.randint(4, 59, (1, 30)), torch.randint(4, 59, (1, 20))
    with torch.no_grad():
        found = converted(input_ids=source, decoder_input_ids=target).logits
        expected = by_torch(state, source, target)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    load(tmp_path / "model")


def test_two_vocabularies_are_refused_even_of_one_size(tmp_path):
    torch.save(random_state(), tmp_path / "weights.pt")
    annalog_convert.convert(tmp_path / "weights.pt", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    said = json.loads(file.read_text())
    for change in ({"separate_vocabs": True}, {"separate_vocabs": None}):
        file.write_text(json.dumps({**said, **change}))
        with pytest.raises(RefusedError, match="a vocabulary for the source and another one for the target"):
            load(tmp_path / "model")


@pytest.mark.parametrize("content", [{}, {annalog.FILE: "other weights"}])
def test_another_wheel_than_the_published_one_is_refused(content, tmp_path, monkeypatch):
    write_wheel(only_here(tmp_path / "links", monkeypatch), annalog.REQUIREMENT, content)
    with pytest.raises(RefusedError, match=r"does not carry annalog as it was published; .* --model FOLDER"):
        resolve_model("annalog", tmp_path / "cache", silent)


def random_state():
    state = {}
    for half, attentions in (("encoder", ["self"]), ("decoder", ["self", "encoder"])):
        state[f"{half}.tok_embedding.weight"] = torch.randn(59, SIZE) * 0.02
        state[f"{half}.pos_embedding.weight"] = torch.randn(102, SIZE) * 0.3
        for layer in (f"{half}.layers.{index}" for index in range(LAYERS)):
            linears = [(f"{one}_attention.fc_{part}", SIZE, SIZE) for one in attentions for part in "qkvo"]
            linears += [
                ("positionwise_feedforward.fc_1", INNER, SIZE),
                ("positionwise_feedforward.fc_2", SIZE, INNER),
            ]
            for name, rows, columns in linears:
                state[f"{layer}.{name}.weight"] = torch.randn(rows, columns) * 0.08
                state[f"{layer}.{name}.bias"] = torch.randn(rows) * 0.1
            norms = ["self_attn", "ff", *(["enc_attn"] if half == "decoder" else [])]
            for name in norms:
                state[f"{layer}.{name}_layer_norm.weight"] = 1 + torch.randn(SIZE) * 0.1
                state[f"{layer}.{name}_layer_norm.bias"] = torch.randn(SIZE) * 0.1
    state["decoder.fc_out.weight"] = torch.randn(59, SIZE) * 0.1
    state["decoder.fc_out.bias"] = torch.randn(59) * 0.1
    return state


def by_torch(state, source, target):
    def embed(half, ids):
        return (
            state[f"{half}.tok_embedding.weight"][ids] * SIZE**0.5
            + state[f"{half}.pos_embedding.weight"][: ids.shape[1]]
        )

    options = {"dim_feedforward": INNER, "dropout": 0.0, "batch_first": True}
    vectors = embed("encoder", source)
    for index in range(LAYERS):
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, **options)
        fill(layer, state, f"encoder.layers.{index}", {"self_attn": "self"}, ["self_attn", "ff"])
        vectors = layer.eval()(vectors)
    hidden, causal = embed("decoder", target), nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    for index in range(LAYERS):
        layer = nn.TransformerDecoderLayer(SIZE, HEADS, **options)
        attentions = {"self_attn": "self", "multihead_attn": "encoder"}
        fill(layer, state, f"decoder.layers.{index}", attentions, ["self_attn", "enc_attn", "ff"])
        hidden = layer.eval()(hidden, vectors, tgt_mask=causal)
    return hidden @ state["decoder.fc_out.weight"].T + state["decoder.fc_out.bias"]


def fill(layer, state, prefix, attentions, norms):
    """Gives a layer of torch the weights of ANNalog's of this name."""
    for own, name in attentions.items():
        attention = getattr(layer, own)
        for kind in ("weight", "bias"):
            parts = [state[f"{prefix}.{name}_attention.fc_{part}.{kind}"] for part in "qkv"]
            getattr(attention, f"in_proj_{kind}").data.copy_(torch.cat(parts))
            getattr(attention.out_proj, kind).data.copy_(state[f"{prefix}.{name}_attention.fc_o.{kind}"])
    for kind in ("weight", "bias"):
        for number, name in enumerate(norms, 1):
            getattr(getattr(layer, f"norm{number}"), kind).data.copy_(
                state[f"{prefix}.{name}_layer_norm.{kind}"]
            )
        for number in (1, 2):
            linear = getattr(layer, f"linear{number}")
            getattr(linear, kind).data.copy_(state[f"{prefix}.positionwise_feedforward.fc_{number}.{kind}"])
