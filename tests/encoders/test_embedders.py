"""Decoders made for embeddings: transformers' own vectors, prompts by name, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from typer.testing import CliRunner

from longspan import InvalidRequestError, PreconditionError
from longspan.v1 import encoder_pb2
from server.cli.application import application
from server.encoder_messages import Pooling, Task
from server.errors import RefusedError
from server.models.encoders.load import load_encoder
from server.models.encoders.recognize import holds_encoder
from server.models.encoders.sentence import read_sentence_files
from tests.e2e.here import serving
from tests.encoders.zoo import save_embedder
from tests.models_zoo import VOCABULARY, save_tiny

PROMPTS = {"query": "Instruct: find it\nQuery:", "document": ""}


def load(folder):
    return load_encoder(folder, "auto", "cpu", None, lambda stage, fraction: None)


def own_vectors(folder, texts):
    """transformers' own, each text by a model that has seen no other."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for text in texts:
        with torch.no_grad():
            yield copy.deepcopy(model)(torch.tensor([text])).last_hidden_state[0]


def random_texts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("mistral", {}),  # with a window
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma3", {}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gpt2", {}),
        ("qwen3_moe", {}),
    ],
)
def test_an_embedder_gives_the_vectors_of_transformers(kind, config, tmp_path):
    folder = save_embedder(kind, tmp_path, **config)
    assert holds_encoder(folder)
    loaded = load(folder)
    assert (loaded.tasks, loaded.head) == ((Task.EMBED,), None)
    assert (loaded.files.pooling, loaded.files.normalized) == (Pooling.LAST, True)
    wanted = "bidirectional" if config.get("use_bidirectional_attention") else "causal"
    assert loaded.encoder.attention == wanted
    texts = random_texts(1, 5, 5, 5, 30, 30, 200)
    served = loaded.encoder.hidden(texts, [[] for _ in texts])
    for vectors, expected in zip(served, own_vectors(folder, texts), strict=True):
        torch.testing.assert_close(vectors, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + index for index in range(8)],
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_a_longer_text_does_not_change_a_shorter_one(rope, tmp_path):
    """transformers derives these rotary frequencies from the longest text of a batch."""
    folder = save_embedder(
        "llama", tmp_path, rope_parameters={"rope_theta": 10_000.0, **rope}, max_position_embeddings=64
    )
    loaded = load(folder)
    texts = random_texts(5, 60, 64)
    if rope["rope_type"] == "dynamic":
        texts += random_texts(100, 200)
        assert loaded.context_length == 256
    served = loaded.encoder.hidden(texts, [[] for _ in texts])
    for vectors, expected in zip(served, own_vectors(folder, texts), strict=True):
        torch.testing.assert_close(vectors, expected, atol=2e-4, rtol=1e-4)


def test_an_output_layer_is_left_out(tmp_path):
    folder = save_embedder("llama", tmp_path, bare=False)
    (vectors,) = load(folder).encoder.hidden([[5, 6, 7]], [[]])
    (expected,) = own_vectors(folder, [[5, 6, 7]])
    torch.testing.assert_close(vectors, expected, atol=2e-4, rtol=1e-4)


def test_without_pooling_a_decoder_generates(tmp_path):
    folder = save_tiny("llama", tmp_path)
    assert not holds_encoder(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""}]))
    assert not holds_encoder(folder)


def test_code_of_an_embedder_is_not_passed_over(tmp_path):
    folder = save_embedder("qwen2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_qwen.Qwen2Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="brings Python code that computes its vectors"):
        load(folder)


def test_a_cap_of_scores_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"caps its attention's scores \(softcap\)"):
        load(save_embedder("gemma2", tmp_path))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"prompts": {"query": 1}}, "its prompts are no texts by name"),
        (
            {"prompts": {"query": "a"}, "default_prompt_name": "x"},
            "names the default prompt 'x', which is not",
        ),
        ({"prompts": {"query": "a" * 70_000}}, "have more than 65536 characters"),
    ],
)
def test_prompts_that_can_not_be_used_are_refused(files, sentence, tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(files))
    with pytest.raises(RefusedError, match=sentence):
        read_sentence_files(tmp_path)


def test_prompts_that_a_mean_leaves_out_are_refused(tmp_path):
    save_embedder("llama", tmp_path, pooling="mean_tokens", prompts=PROMPTS)
    pooling = tmp_path / "1_Pooling" / "config.json"
    assert dict(read_sentence_files(tmp_path).prompts) == PROMPTS
    pooling.write_text(json.dumps({"pooling_mode": "mean", "include_prompt": False}))
    with pytest.raises(RefusedError, match=r"leaves a prompt's own tokens out \(include_prompt\)"):
        read_sentence_files(tmp_path)
    pooling.write_text(json.dumps({"pooling_mode": "lasttoken", "include_prompt": False}))
    assert read_sentence_files(tmp_path).pooling is Pooling.LAST
    pooling.unlink()
    with pytest.raises(RefusedError, match=r"1_Pooling/config.json can't be read"):
        read_sentence_files(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_embedder("qwen3", tmp_path_factory.mktemp("embedder"), prompts=PROMPTS, default="query")


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=str(folder), threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(folder):
    """Embeddings as sentence-transformers computes them: prompt and text are one, the last token's vector."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    def embed(texts, prompt):
        found = []
        for text in texts:
            with torch.no_grad():
                hidden = model(torch.tensor([tokenizer.encode(prompt + text).ids])).last_hidden_state
            found.append(torch.nn.functional.normalize(hidden[0, -1], dim=0))
        return torch.stack(found)

    return embed


TEXTS = ["a cat", "the cat sat on the mat", "a dog", "x" * 60, "an invoice"]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, PROMPTS["query"]),
        ({"prompt_name": "query"}, PROMPTS["query"]),
        ({"prompt_name": "document"}, ""),
        ({"prompt_name": ""}, ""),
    ],
)
def test_texts_begin_with_the_prompt_that_is_named(client, expected, options, prompt):
    got = torch.tensor([list(each.values) for each in client.embed(TEXTS, **options).embeddings])
    torch.testing.assert_close(got, expected(TEXTS, prompt), atol=1e-5, rtol=0)


def test_token_ids_are_taken_without_a_prompt(client, expected, folder):
    ids = [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in TEXTS]
    got = torch.tensor([list(each.values) for each in client.embed(ids).embeddings])
    torch.testing.assert_close(got, expected(TEXTS, ""), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ("a cat", r"is 'passage', which is no prompt of this model; it knows 'query', 'document'"),
        ([[5, 6]], "is for texts; token ids are taken as they are"),
    ],
)
def test_a_prompt_that_can_not_be_had_is_refused(client, texts, sentence):
    with pytest.raises(InvalidRequestError, match=sentence) as caught:
        client.embed(texts, prompt_name="passage")
    assert [violation.field for violation in caught.value.violations] == ["prompt_name"]


def test_it_tells_what_it_is(client, server):
    info = client.model_info()
    assert (dict(info.encoder.prompts), info.encoder.default_prompt_name) == (PROMPTS, "query")
    assert (info.encoder.pooling, info.encoder.normalized) == (encoder_pb2.POOLING_LAST, True)
    assert (info.architecture, info.attention.pattern) == ("Qwen3Model", "causal")
    with pytest.raises(PreconditionError, match="is a Qwen3Model, which answers Embed"):
        client.generate("a")
    place = ["--host", server.host, "--port", str(server.port), "--prompt-name", "document"]
    result = CliRunner().invoke(application, ["embed", "a cat", "a cat", *place])
    assert result.output == " 1.000  a cat\n" * 2
