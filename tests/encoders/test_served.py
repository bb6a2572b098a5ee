"""The real encoder, served by the real server, against transformers one text at a time."""

import asyncio
import json
import os
import pydoc_data.topics
import signal
import time
from contextlib import nullcontext

import grpc
import psutil
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from typer.testing import CliRunner

from loadtest.measuring import servers
from loadtest.servers import Address
from longspan import AlreadyExistsError, InvalidRequestError, LongspanError, PreconditionError
from longspan.v1 import encoder_pb2, inference_pb2
from server.cli.application import application
from server.cli.embed import _in_a_row
from tests.command import longspan

pytestmark = pytest.mark.long

WORDS = " ".join(pydoc_data.topics.topics.values()).split()
LONG = " ".join(WORDS[:120])
LENGTHS = (1, 3, 3, 7, 20, 20, 45, 90, 150, 11, 11, 11, 2, 60)
TEXTS = [" ".join(WORDS[100 * i : 100 * i + length]) for i, length in enumerate(LENGTHS)]
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def own(minilm):
    """Vectors of all tokens of each text, by transformers in float32, without padding."""
    model = transformers.AutoModel.from_pretrained(minilm, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with torch.no_grad():
        ids = [tokenizer.encode(text).ids for text in TEXTS]
        return ids, [model(torch.tensor([one])).last_hidden_state[0] for one in ids]


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


async def until_busy(client):
    """Waits until the engine has texts to compute."""
    async with asyncio.timeout(30):
        while not (await client.server_info()).load.waiting:  # noqa: ASYNC110 (the engine sends no event)
            await asyncio.sleep(0.01)


def computed_tokens(server):
    return server.metrics().get("longspan_engine_step_batch_tokens_sum", 0.0)


def vectors(response):
    return torch.tensor([list(embedding.values) for embedding in response.embeddings])


def test_embeddings_are_those_of_transformers(client, own):
    ids, hidden = own
    expected = torch.stack([torch.nn.functional.normalize(one.mean(0), dim=0) for one in hidden])
    response = client.embed(TEXTS)
    torch.testing.assert_close(vectors(response), expected, **TOLERANCE)
    assert [embedding.tokens for embedding in response.embeddings] == [len(one) for one in ids]
    assert response.usage.prompt_tokens == sum(map(len, ids))
    assert response.timings.prefill_seconds > 0
    torch.testing.assert_close(vectors(client.embed(TEXTS[0])), expected[:1], **TOLERANCE)
    torch.testing.assert_close(vectors(client.embed(ids)), expected, **TOLERANCE)


def test_other_poolings(client, own):
    _, hidden = own
    for pooling, expected in {
        "mean": [one.mean(0) for one in hidden],
        "cls": [one[0] for one in hidden],
        "last": [one[-1] for one in hidden],
    }.items():
        got = vectors(client.embed(TEXTS, pooling=pooling, normalize=False))
        torch.testing.assert_close(got, torch.stack(expected), **TOLERANCE)
    ids, _ = own
    response = client.embed(TEXTS[:4], pooling="none", normalize=False)
    for embedding, one, tokens in zip(response.embeddings, hidden, ids, strict=False):
        assert list(embedding.token_ids) == tokens
        got = torch.tensor(list(embedding.values)).view(embedding.tokens, -1)
        torch.testing.assert_close(got, one, **TOLERANCE)


def test_a_long_text_is_cut_only_where_that_is_asked_for(client, minilm):
    long = " ".join(WORDS[:600])
    with pytest.raises(
        InvalidRequestError, match=r"texts\[1\]: has \d+ tokens.* 256 at most.* truncate"
    ) as caught:
        client.embed(["short", long])
    assert caught.value.reason == "TEXT_TOO_LONG"
    assert caught.value.violations[0].field == "texts[1]"
    response = client.embed(["short", long], truncate=True)
    assert [(e.tokens, e.truncated) for e in response.embeddings] == [(3, False), (256, True)]
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = tokenizer.encode(long).ids
    torch.testing.assert_close(vectors(client.embed([ids]))[0], vectors(response)[1], **TOLERANCE)


async def test_many_clients_at_once_get_their_own(server, own):
    _, hidden = own
    expected = [torch.nn.functional.normalize(one.mean(0), dim=0) for one in hidden]
    async with server.aclient() as client:

        async def ask(index: int) -> None:
            (embedding,) = (await client.embed(TEXTS[index])).embeddings
            torch.testing.assert_close(torch.tensor(list(embedding.values)), expected[index], **TOLERANCE)

        await asyncio.gather(*(ask(index % len(TEXTS)) for index in range(40)))
    server.wait_idle()


@pytest.mark.parametrize(
    ("request_", "field", "sentence"),
    [
        ({}, "texts", "is empty; send texts or token_ids"),
        ({"texts": ["a"], "token_ids": [{"ids": [1]}]}, "texts", "and token_ids are both set"),
        ({"texts": ["a", ""]}, "texts[1]", "is empty; send at least one character"),
        ({"texts": ["a"] * 49}, "texts", "has 49 texts; this server takes 48 at most"),
        ({"texts": ["a" * 300_000]}, "texts[0]", "has 300000 bytes; this server takes 262144 at most"),
        (
            {"token_ids": [{"ids": [1, 30522]}]},
            "token_ids[0].ids[1]",
            "is 30522; the model's token ids go",
        ),
        ({"token_ids": [{"ids": []}]}, "token_ids[0].ids", "is empty; send at least one token id"),
        ({"token_ids": [{"ids": [1] * 257}]}, "token_ids[0].ids", "so send it in parts"),
        ({"token_ids": [{"ids": [1]}], "truncate": True}, "truncate", "is for texts"),
        (
            {"token_ids": [{"ids": [1] * 256}] * 43, "pooling": encoder_pb2.POOLING_NONE},
            "pooling",
            "are sent, so send fewer or shorter texts",
        ),
        ({"texts": ["a"], "pooling": 9}, "pooling", "is 9, which no pooling has"),
        ({"texts": ["a"], "request_id": "a b"}, "request_id", "it may have 1 to 128 letters"),
    ],
)
def test_a_wrong_field_is_named(client, request_, field, sentence):
    with pytest.raises(InvalidRequestError) as caught:
        client._ask(client._encoders.Embed, encoder_pb2.EmbedRequest(**request_), 10)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert sentence in violation.description
    assert "set truncate" not in violation.description, "it is for texts"


def test_an_encoder_does_not_generate(client):
    with pytest.raises(
        PreconditionError, match=r"is a BertModel, which answers Embed; for Generate .* ask a"
    ) as caught:
        client.generate("hello")
    assert (caught.value.reason, caught.value.metadata["tasks"]) == ("TASK_NOT_SERVED", "embed")
    info = client.model_info()
    assert list(info.tasks) == [inference_pb2.TASK_EMBED]
    assert (info.encoder.embedding_size, info.encoder.normalized) == (384, True)
    assert info.encoder.pooling == encoder_pb2.POOLING_MEAN
    assert (info.name, info.context_length, info.limits.texts) == ("minilm", 256, 48)
    assert (info.executor.name, info.attention.pattern) == ("flattened", "bidirectional")


def test_tokens_are_counted_with_the_frame(client):
    assert client.count_tokens("a cat").token_count == 4
    assert list(client.tokenize("a cat").tokens) == ["[CLS]", "a", "cat", "[SEP]"]


async def test_a_request_that_is_left_or_aborted_leaves_nothing(server):
    long = [LONG] * 40
    before = computed_tokens(server)
    async with server.aclient() as client:
        task = asyncio.create_task(client.embed(long, request_id="left"))
        await until_busy(client)
        with pytest.raises(AlreadyExistsError):
            await client.embed("a", request_id="left")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        task = asyncio.create_task(client.embed(long, request_id="ended"))
        await until_busy(client)
        assert await client.abort("ended")
        with pytest.raises(LongspanError, match="ended by Abort") as caught:
            await task
        assert caught.value.reason == "ABORTED"
        with pytest.raises(LongspanError, match="did not answer in time"):
            await client.embed(long, timeout=0.1)
        server.wait_idle()
        computed = computed_tokens(server) - before
        whole = (await client.embed(long)).usage.prompt_tokens
    assert computed < 2 * whole, "texts of three requests that are gone were still computed"


async def test_admission_counts_texts(server):
    long = [LONG] * 40
    async with server.aclient() as client:
        task = asyncio.create_task(client.embed(long))
        await until_busy(client)
        with pytest.raises(LongspanError, match="has 40 of at most 48 sequences in flight"):
            await client.embed(long)
        await client.embed(["a few words"] * 8)
        assert not task.done(), "a few texts need not wait for many"
        task.cancel()
    server.wait_idle()


def test_metrics(server, client):
    before = server.metrics()
    client.embed(["a cat", "a dog"])
    after = server.metrics()

    def more(name):
        return after[name] - before.get(name, 0.0)

    assert more('longspan_requests_total{finish_reason="stop",grpc_code="OK"}') == 1
    assert more("longspan_prompt_tokens_total") == 8
    assert more("longspan_e2e_request_latency_seconds_count") == 1
    assert more('longspan_engine_step_duration_seconds_count{phase="prefill"}') >= 1
    method = 'grpc_code="OK",grpc_method="Embed",grpc_service="longspan.v1.EncoderService",grpc_type="unary"'
    assert more(f"longspan_grpc_server_handled_total{{{method}}}") == 1


def test_the_command(server):
    place = ["--host", server.host, "--port", str(server.port)]
    result = CliRunner().invoke(application, ["embed", "a cat", "a kitten", "an invoice", *place])
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert [text for _, text in lines] == ["a cat", "a kitten", "an invoice"]
    first, near, far = (float(number) for number, _ in lines)
    assert first == 1.0
    assert near > 0.7 > 0.3 > far
    result = CliRunner().invoke(application, ["embed", "-", "--json", *place], input="a\n\n \nb\n")
    assert [json.loads(line)["text"] for line in result.output.splitlines()] == ["a", "b"]
    result = CliRunner().invoke(application, ["embed", "a\nb", *place])
    assert result.output == " 1.000  a\\nb\n"
    result = CliRunner().invoke(application, ["embed", "-", *place], input="\n")
    assert (result.exit_code, "standard input has no text" in result.output) == (2, True)
    result = CliRunner().invoke(application, ["embed", " ".join(WORDS[:600]), *place])
    assert result.exit_code == 1
    assert "truncate" in result.output


def test_a_text_is_cut_to_its_row():
    assert _in_a_row("abcdef", 6) == "abcdef"
    assert _in_a_row("abcdefg", 6) == "abc..."
    assert _in_a_row("a\nb\n\n", 6) == "a\\n..."


def test_an_encoder_has_no_process_for_chats_and_no_zombie(server, client):
    client.wait_until_ready(10)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert not [child for child in children if child.status() == psutil.STATUS_ZOMBIE]
    assert not [child for child in children if "server.text.template_program" in child.cmdline()]


def test_the_engine_dies_and_comes_back(server, client):
    call = client._encoders.Embed.future(encoder_pb2.EmbedRequest(texts=[LONG] * 48))
    end = time.monotonic() + 30
    while not client.server_info().load.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(server.engine_pid, signal.SIGKILL)
    with pytest.raises(grpc.RpcError, match="has lost its engine") as caught:
        call.result()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    client.wait_until_ready(60)
    assert len(client.embed("a cat").embeddings) == 1


def test_a_measurement_of_generation_says_at_once_that_there_is_none(server, minilm, monkeypatch):
    """Neither ``load`` nor ``compare`` measures an encoder."""
    running = Address(server.host, server.port, server.metrics_port, server.process.pid)

    def serve(*arguments, begun):
        """In place of another server of the same model."""
        assert arguments[:4] == ("--model", str(minilm), "--threads", "1")
        return nullcontext(running)

    monkeypatch.setattr(servers, "serve", serve)
    sentence = "which answers Embed; for Generate and StreamGenerate ask a server of a model that generates"
    for arguments in (
        ["load", "--port", str(server.port), "--no-metrics"],
        ["compare", "--model", str(minilm), "--context", "256", "--", "--threads", "1"],
    ):
        done = longspan(*arguments)
        assert done.returncode != 0
        assert sentence in " ".join(done.stderr.split()), done.stderr


def test_the_metrics_name_the_attention_as_the_ready_line_does(server):
    assert 'attention_backend="bidirectional"' in "".join(server.metrics())
