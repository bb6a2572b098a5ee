"""A classifier of texts and pairs, served, against transformers."""

import random
import subprocess
import sys
from collections import Counter

import grpc
import pytest
import tokenizers
import torch
import transformers
from google.rpc.error_details_pb2 import BadRequest

from longspan import InvalidRequestError, PreconditionError
from longspan.v1 import inference_pb2
from server.api.encoder_inputs import tokens_of
from server.api.errors import ServiceError
from server.api.state import Served
from server.encoder_messages import Encode, Task
from server.engine.encoder_build import build_encoder
from server.settings import Settings
from server.text.encoder_texts import encoder_texts
from server.text.tokenizer import Tokenizer
from tests.e2e.here import serving
from tests.encoders.zoo import CONTEXT, save_encoder
from tests.soak.inputs import FIELDS, inputs

LABELS = {0: "no", 1: "perhaps", 2: "yes"}
INPUTS = ["import a module", ("what is a class", "a class is a thing"), ("import", "x " * 12), "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder("bert", tmp_path_factory.mktemp("bert"), "SequenceClassification", id2label=LABELS)


@pytest.fixture(scope="module")
def server(folder):
    with serving(model=str(folder), threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def test_scores_are_those_of_transformers(client, folder):
    response = client.score(INPUTS)
    assert list(response.labels) == ["no", "perhaps", "yes"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for one, scores in zip(INPUTS, response.scores, strict=True):
        tokens = tokenizer.encode(*([one] if isinstance(one, str) else one))
        with torch.no_grad():
            logits = model(torch.tensor([tokens.ids]), token_type_ids=torch.tensor([tokens.type_ids])).logits[
                0
            ]
        torch.testing.assert_close(torch.tensor(list(scores.logits)), logits, atol=1e-4, rtol=1e-5)
        probabilities = torch.tensor(list(scores.probabilities))
        torch.testing.assert_close(probabilities, torch.softmax(logits, 0), atol=1e-5, rtol=1e-4)
        assert (scores.tokens, scores.truncated) == (len(tokens.ids), False)
    assert response.usage.prompt_tokens == sum(scores.tokens for scores in response.scores)


async def test_the_asyncio_client_scores_the_same(client, server):
    async with server.aclient() as other:
        for ours, theirs in zip(client.score(INPUTS).scores, (await other.score(INPUTS)).scores, strict=True):
            assert ours.tokens == theirs.tokens
            # How many texts a step has depends on when they come, and rounds differently.
            assert list(ours.logits) == pytest.approx(list(theirs.logits), abs=1e-5)


def test_long_pairs_are_cut_only_where_that_is_asked_for(client):
    long = ("import", "x " * 200)
    with pytest.raises(InvalidRequestError, match=rf"inputs\[1\]: has \d+ tokens.* {CONTEXT} at most"):
        client.score(["a", long])
    (scores,) = client.score([long], truncate=True).scores
    assert (scores.tokens, scores.truncated) == (CONTEXT, True)


@pytest.mark.parametrize(
    ("inputs", "field", "sentence"),
    [
        ([], "inputs", "is empty; send at least one text or pair"),
        (["a", ""], "inputs[1].text", "is empty; send at least one character"),
        ([("a", "")], "inputs[0].pair", "is empty; send at least one character"),
        (["a"] * 321, "inputs", "has 321 texts; this server takes 320 at most"),
    ],
)
def test_a_wrong_field_is_named(client, inputs, field, sentence):
    with pytest.raises(InvalidRequestError) as caught:
        client.score(inputs)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert sentence in violation.description


def test_hostile_values_of_every_field_are_answered_or_refused(server):
    wanted = {name for name in FIELDS if name.startswith(("EmbedRequest.", "ScoreRequest."))}
    made = (one for one in inputs(random.Random(1)) if one.field in wanted)
    tried, statuses = set(), Counter()
    with grpc.insecure_channel(f"{server.host}:{server.port}") as channel:
        while tried != wanted or statuses.total() < 100:
            one = next(made)
            tried.add(one.field)
            call = channel.unary_unary(one.method).future(one.payload, timeout=60)
            statuses[call.code().name] += 1
    assert not {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"} & {*statuses}, statuses
    assert statuses["OK"] > 5 < statuses["INVALID_ARGUMENT"], statuses


def test_it_tells_what_it_can(client):
    info = client.model_info()
    assert list(info.tasks) == [inference_pb2.TASK_EMBED, inference_pb2.TASK_SCORE]
    assert list(info.encoder.labels) == ["no", "perhaps", "yes"]
    assert len(client.embed(["a", "b"]).embeddings) == 2
    with pytest.raises(PreconditionError, match="answers Embed and Score; for Generate"):
        client.generate("a")


_MEMORY = """
import resource, sys, tokenizers
from server.text.encoder_texts import encoder_texts
backend = tokenizers.Tokenizer.from_file(sys.argv[1])
def peak(count):
    encoder_texts(backend, ["!" * (1 << 17)] * count, most=96, truncate=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak(1)
one, six = peak(1), peak(6)
sys.exit(f"{one} KiB for one text, {six} for six" if six > 1.3 * one else 0)
"""


def test_six_long_texts_take_no_more_memory_than_one(folder):
    subprocess.run([sys.executable, "-c", _MEMORY, folder / "tokenizer.json"], check=True)


def built(folder):
    """An engine of the model, and what the server process knows of it."""
    core, ready = build_encoder(Settings(threads=1), folder, lambda stage, fraction: None)
    return core, Served("bert", "", Tokenizer(folder), None, ready, None)


def scored(core, *texts):
    """The scores of each text, all computed in one step."""
    for number, text in enumerate(texts):
        core.submit(Encode(id=number, task=Task.SCORE, turn=0, tokens=text.tokens, types=text.types))
    return [torch.frombuffer(bytearray(one.values), dtype=torch.float32) for one in core.step().sequences]


def test_token_types_that_the_model_lacks_are_refused(tmp_path):
    folder = save_encoder("bert", tmp_path, "SequenceClassification", num_labels=2, type_vocab_size=1)
    core, served = built(folder)
    with pytest.raises(ServiceError, match=r"the model.s go from 0 to 0; send both texts as one") as caught:
        tokens_of(["a", ("a", "b")], "inputs", served, truncate=False)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (found,) = (detail for detail in caught.value.details if isinstance(detail, BadRequest))
    assert found.field_violations[0].field == "inputs[1]"
    scores = scored(core, *tokens_of(["a", "b"], "inputs", served, truncate=False))
    assert [len(of_text) for of_text in scores] == [4, 4]  # logits and probabilities of both labels
    assert all(of_text.isfinite().all() for of_text in scores)


def test_token_types_that_are_not_meant_are_left_out(tmp_path):
    folder = save_encoder("bert", tmp_path, "SequenceClassification", types=False, num_labels=2)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        own = transformers.AutoTokenizer.from_pretrained(folder)("a", "b", return_tensors="pt")
        logits = model(**own).logits[0]
    core, served = built(folder)
    (text,) = tokens_of([("a", "b")], "inputs", served, truncate=False)
    (scores,) = scored(core, text)
    torch.testing.assert_close(scores[:2], logits, atol=1e-4, rtol=1e-5)


def test_pairs_are_cut_as_the_library_cuts_them(folder):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for one, other, most in [(1, 20, 12), (20, 1, 12), (9, 9, 12), (9, 10, 13), (10, 9, 12), (3, 4, 30)]:
        pair = "a " * one, "x " * other
        tokenizer.enable_truncation(most)
        (got,) = encoder_texts(plain, [pair], most=most, truncate=True)
        expected = tokenizer.encode(*pair)
        assert (got.tokens, got.types) == (expected.ids, expected.type_ids)
