"""A model that has no tokenizer serves token ids."""

import grpc
import pytest
from grpc import aio

from longspan.v1 import inference_pb2
from server.errors import RefusedError
from server.text.load import check_tokens, load_tokenizer
from server.text.no_tokenizer import NoTokenizer
from tests.api.conftest import ask, details
from tests.api.fake_engine import READY

PROMPT = {"ids": [1, 2, 3]}


@pytest.fixture(scope="module")
def tokenizer():
    return NoTokenizer()


async def test_ids_come_back_and_no_text(running):
    logprobs = {"output": 1, "prompt": 0}
    answer = await running.stub.Generate(ask(None, token_ids=PROMPT, logprobs=logprobs, n=2))
    for sample in answer.completions:
        assert len(sample.token_ids) == len(sample.logprobs) == 5
        assert sample.text == ""
        assert {entry.chosen.text for entry in sample.logprobs} == {""}
    request = ask(None, token_ids=PROMPT, keep_special_tokens=True)
    events = await running.events(request)
    streamed = [token for event in events for token in event.delta.token_ids]
    assert streamed == list(answer.completions[0].token_ids)
    info = await running.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert not info.has_chat_template


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "hello"},
        {"text": None, "chat": {"messages": [{"role": "user", "content": "hi"}]}},
        {"text": None, "token_ids": PROMPT, "stop": {"stop_strings": ["."]}},
    ],
    ids=["text", "chat", "stop strings"],
)
async def test_requests_with_text_are_refused(fields, running):
    check(await running.refused(ask(**fields)))


async def test_what_only_a_tokenizer_can_do_is_refused(running):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for call, request in (
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(text="x")),
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(chat=chat)),
        (running.stub.CountTokens, inference_pb2.CountTokensRequest(text="x")),
        (running.stub.Detokenize, inference_pb2.DetokenizeRequest(token_ids=[1])),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await call(request)
        check(caught.value)


def check(error):
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)["ErrorInfo"].reason == "NO_TOKENIZER"
    assert "has no tokenizer: it takes prompts as token ids" in error.details()


def test_the_start_says_so(caplog):
    tokenizer = load_tokenizer(None, "a folder", None)
    assert "a folder has no tokenizer: token ids are served" in caplog.text
    assert not tokenizer.has_text


def test_a_chat_template_needs_one():
    with pytest.raises(RefusedError, match="--chat-template: the model has no tokenizer"):
        load_tokenizer(None, "the model", "default")


def test_the_start_says_that_some_texts_can_be_no_prompts(caplog, running_tokenizer):
    running_tokenizer.vocabulary_size = READY.vocabulary_size
    check_tokens(running_tokenizer, READY.vocabulary_size)
    assert caplog.text == ""
    running_tokenizer.vocabulary_size += 2
    check_tokens(running_tokenizer, READY.vocabulary_size)
    assert f"has 2 tokens that the model lacks, from {READY.vocabulary_size} on" in caplog.text


@pytest.fixture
def running_tokenizer():
    return NoTokenizer()
