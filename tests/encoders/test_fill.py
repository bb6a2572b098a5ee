"""Masks filled as transformers' own classes fill them: every family, and one served, with identities."""

import json

import msgspec
import pytest
import torch
import transformers
from tokenizers import AddedToken
from typer.testing import CliRunner

from longspan import (
    AsyncClient,
    BusyError,
    Client,
    InvalidRequestError,
    LongspanError,
    PreconditionError,
    UnauthenticatedError,
)
from longspan.v1 import inference_pb2
from server.access.identities import token_hash
from server.api.errors import ServiceError
from server.api.state import Served
from server.cli.application import application
from server.encoder_messages import Encode, Task
from server.engine.encoder_core import EncoderCore
from server.errors import RefusedError
from server.models.encoders.head import Head
from server.models.encoders.load import load_encoder
from server.text.tokenizer import Tokenizer
from tests.api.conftest import GENERATION, save_tokenizer
from tests.api.fake_engine import READY
from tests.e2e.here import serving
from tests.encoders.zoo import CONTEXT, VOCABULARY, save_encoder

MASK = 4
TEXTS = ["import [MASK]", "[MASK] class is a [MASK] with [MASK]", "what [MASK] it"]
LONG = "x " * 200


def load(folder):
    return load_encoder(folder, "auto", "cpu", None, lambda stage, fraction: None)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *((kind, {}) for kind in ("bert", "roberta", "distilbert", "albert", "electra", "modernbert")),
        ("bert", {"tie_word_embeddings": False}),
    ],
)
def test_a_family_fills_as_in_transformers(kind, config, tmp_path, monkeypatch):
    monkeypatch.setattr("server.engine.encoder_core._MASKS_AT_ONCE", 2)
    folder = save_encoder(kind, tmp_path, "MaskedLM", **config)
    loaded = load(folder)
    assert loaded.tasks == (Task.EMBED, Task.FILL)
    assert (loaded.labels, loaded.chances) == ([], None)
    core = EncoderCore(
        loaded.encoder, head=loaded.head, context_length=CONTEXT, max_running=4, max_batch_tokens=100
    )
    texts = [[2, 40, MASK, 41, 3], [2, MASK, 50, MASK, MASK, 3], [2, *range(30, 60), MASK, 3]]
    for id_, tokens in enumerate(texts):
        core.submit(Encode(id=id_, task=Task.FILL, turn=id_, tokens=tokens, mask_token=MASK, top_k=7))
    own = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    for result in core.step().sequences:
        ids = torch.tensor([texts[result.id]])
        with torch.no_grad():
            expected = torch.log_softmax(own(ids).logits[ids == MASK], -1).topk(7)
        assert result.tokens == expected.indices.flatten().tolist()
        got = torch.frombuffer(bytearray(result.values), dtype=torch.float32)
        torch.testing.assert_close(got, expected.values.flatten(), atol=1e-4, rtol=1e-5)


def test_a_head_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Head, "logits", lambda self, hidden: torch.zeros(len(hidden), VOCABULARY))
    with pytest.raises(RefusedError, match="its head makes other logits of a text's vectors"):
        load(save_encoder("bert", tmp_path, "MaskedLM"))


def test_a_discriminator_is_no_masked_model(tmp_path):
    with pytest.raises(RefusedError, match="ElectraForPreTraining has a head whose task is not served"):
        load(save_encoder("electra", tmp_path, "PreTraining"))


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_a_checkpoint_of_pretraining_fills(kind, tmp_path):
    """Its second head, for sentences that follow each other, is not served."""
    loaded = load(save_encoder(kind, tmp_path, "PreTraining"))
    assert loaded.tasks == (Task.EMBED, Task.FILL)
    text = [2, 40, MASK, 41, 3]
    (hidden,) = loaded.encoder.hidden([text], [[]])
    own = transformers.AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = own(torch.tensor([text])).prediction_logits[0]
    torch.testing.assert_close(loaded.head.logits(hidden), expected, atol=1e-4, rtol=1e-5)


def test_weights_of_another_class_are_refused_by_its_name(tmp_path):
    folder = save_encoder("bert", tmp_path, "SequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(RefusedError, match=r"no place in BertForMaskedLM; choose a model without it"):
        load(folder)


def test_without_a_mask_token_nothing_is_filled(tmp_path):
    ready = msgspec.structs.replace(READY, tasks=(Task.EMBED, Task.FILL))
    served = Served("m", "s", Tokenizer(save_tokenizer(tmp_path)), None, ready, GENERATION)
    assert served.tasks == (Task.EMBED,)
    with pytest.raises(ServiceError, match=r"which answers Embed; for FillMask .* has a mask token"):
        served.check_task(Task.FILL)


def test_a_mask_is_spelled_as_the_tokenizer_has_it(tmp_path):
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    fast.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})  # as RoBERTa's
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.mask_token == "<mask>"
    (text,) = tokenizer.encoder_texts(["a <mask> b<mask>"], most=9, truncate=False)
    mask = tokenizer.special_tokens["<mask>"]
    assert text.tokens == [ord("a"), mask, ord(" "), ord("b"), mask]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder("bert", tmp_path_factory.mktemp("bert"), "MaskedLM")


@pytest.fixture(scope="module")
def server(folder):
    file = folder.parent / "identities.toml"
    file.write_text(
        f"[alice]\ntoken_sha256 = ['{token_hash('of alice')}']\n"
        f"[bob]\ntoken_sha256 = ['{token_hash('of bob')}']\ntokens_per_minute = 60\n"
    )
    with serving(model=str(folder), threads=1, identities=file) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.host, server.port, token="of alice") as client:
        yield client


def test_tokens_are_those_of_transformers_pipeline(client, folder):
    response = client.fill_mask(TEXTS)
    pipeline = transformers.pipeline("fill-mask", model=str(folder), top_k=5)
    for text, filled in zip(TEXTS, response.texts, strict=True):
        expected = pipeline(text)
        masks = [expected] if isinstance(expected[0], dict) else expected
        for mask, own in zip(filled.masks, masks, strict=True):
            assert [token.token_id for token in mask.tokens] == [each["token"] for each in own]
            assert [token.rank for token in mask.tokens] == [1, 2, 3, 4, 5]
            assert [token.text.strip() for token in mask.tokens] == [each["token_str"] for each in own]
            got = torch.tensor([token.logprob for token in mask.tokens]).exp()
            scores = torch.tensor([each["score"] for each in own])
            torch.testing.assert_close(got, scores, atol=1e-5, rtol=1e-4)
    assert response.texts[1].masks[0].position == 1
    assert response.usage.prompt_tokens == sum(text.tokens for text in response.texts)
    (one,) = client.fill_mask(TEXTS[0], top_k=1).texts[0].masks
    assert one.tokens[0].token_id == response.texts[0].masks[0].tokens[0].token_id


@pytest.mark.parametrize(
    ("texts", "options", "field", "sentence"),
    [
        ([], {}, "texts", "is empty; send at least one text"),
        (["a [MASK]", ""], {}, "texts[1]", "is empty; send at least one character"),
        (["a [MASK]", "a <mask>"], {}, "texts[1]", "has no mask; put [MASK] where a token is to be found"),
        (["[MASK]"] * 321, {}, "texts", "has 321 texts; this server takes 320 at most"),
        (["[MASK]"], {"top_k": 21}, "top_k", "is 21; this server tells 20 tokens of a mask at most"),
        (["[MASK]"], {"top_k": 0}, "top_k", "is 0; ask for at least one token"),
        (["[MASK] " * 90] * 20, {}, "top_k", "asks for 9000 tokens for all masks together; at most 8192"),
        ([f"[MASK] {LONG}"], {}, "texts[0]", f"this model takes {CONTEXT} at most"),
        ([f"{LONG} [MASK]"], {"truncate": True}, "texts[0]", f"among the {CONTEXT} tokens that truncate"),
        (["[MASK]"], {"request_id": "a b"}, "request_id", "it may have 1 to 128 letters"),
    ],
)
def test_a_wrong_field_is_named(client, texts, options, field, sentence):
    with pytest.raises(InvalidRequestError) as caught:
        client.fill_mask(texts, **options)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert sentence in violation.description


def test_a_text_may_lose_masks_where_that_is_asked_for(client):
    (filled,) = client.fill_mask(f"[MASK] {LONG} [MASK]", truncate=True).texts
    assert (len(filled.masks), filled.tokens, filled.truncated) == (1, CONTEXT, True)


def test_it_tells_what_it_can(client):
    info = client.model_info()
    assert list(info.tasks) == [inference_pb2.TASK_EMBED, inference_pb2.TASK_FILL]
    assert info.encoder.mask_token == "[MASK]"
    with pytest.raises(PreconditionError, match="answers Embed and FillMask; for Score ask a"):
        client.score(["a"])


async def test_identities_and_their_limits(server):
    with server.client() as stranger:
        for call in (stranger.fill_mask, stranger.embed, stranger.score):
            with pytest.raises(UnauthenticatedError):
                call(["a [MASK]"])
    async with AsyncClient(server.host, server.port, token="of bob") as bob:
        response = await bob.fill_mask("[MASK] " * 70)
        assert response.usage.prompt_tokens == 72
        with pytest.raises(BusyError) as caught:
            await bob.embed(["a"])
    assert caught.value.reason == "TOKENS_PER_MINUTE"


def test_metrics_name_the_method(server, client):
    client.fill_mask("[MASK]")
    method = (
        'grpc_code="OK",grpc_method="FillMask",grpc_service="longspan.v1.EncoderService",grpc_type="unary"'
    )
    assert server.metrics()[f"longspan_grpc_server_handled_total{{{method}}}"] >= 1


def test_the_command(server):
    place = ["--host", server.host, "--port", str(server.port), "--token", "of alice"]
    result = CliRunner().invoke(application, ["fill", *TEXTS[:2], "--top-k", "2", *place])
    lines = result.output.splitlines()
    assert lines[0] == TEXTS[0]
    assert lines[3] == f"{TEXTS[1]}  (mask 1)"
    assert float(lines[1].split()[0]) >= float(lines[2].split()[0]) > 0
    result = CliRunner().invoke(application, ["fill", "-", "--json", *place], input=f"{TEXTS[1]}\n")
    found = [json.loads(line) for line in result.output.splitlines()]
    assert [each["mask"] for each in found] == [0, 1, 2]
    assert {len(each["tokens"]) for each in found} == {5}
    result = CliRunner().invoke(application, ["fill", "no mask", *place])
    assert (result.exit_code, "put [MASK] where" in result.output) == (1, True)
    with pytest.raises(LongspanError):
        Client(server.host, server.port, token="of eve").fill_mask("[MASK]")


def test_backends_tells_the_tasks_of_an_encoder(folder):
    def run(*more):
        return CliRunner().invoke(application, ["backends", "--model", str(folder), *more])

    result = run()
    assert result.exit_code == 0, result.output
    assert "BertForMaskedLM, an encoder of 2 layers; on cpu, float32" in result.output
    assert "Its tasks: embed, fill." in result.output
    assert json.loads(run("--json").stdout)["tasks"] == ["embed", "fill"]
    result = run("--attention", "sparse")
    assert (result.exit_code, "--attention: for models that generate" in result.output) == (1, True)
