"""Requests of every kind to a server of any model, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message

from longspan.v1 import encoder_pb2, inference_pb2

# What a client's or an operator's choice can come to. Others are the server's own fault.
_ANSWERS = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}
_SECONDS = 60.0

Generate = inference_pb2.GenerateRequest
_FEW = {"max_tokens": 3}
_IDS = {"ids": [5, 6, 7]}
_TEXTS = ("hello", "a", "the module")
_MASK = "[MASK]"
# Of each task, requests of which one at least is to be answered.
_MAIN: dict[str, list[tuple[str, Message]]] = {
    "GENERATE": [
        *(("Generate", Generate(text=text, stop=_FEW)) for text in _TEXTS),
        ("Generate", Generate(token_ids=_IDS, stop=_FEW)),
    ],
    "EMBED": [
        *(("Embed", encoder_pb2.EmbedRequest(texts=[text])) for text in _TEXTS),
        ("Embed", encoder_pb2.EmbedRequest(token_ids=[_IDS])),
    ],
    "SCORE": [("Score", encoder_pb2.ScoreRequest(inputs=[{"text": text}])) for text in _TEXTS],
    "FILL": [("FillMask", encoder_pb2.FillMaskRequest(texts=[f"{text} {_MASK}"])) for text in _TEXTS],
}
_MORE: list[tuple[str, Message]] = [
    ("Generate", Generate(text="hello", stop={"max_tokens": 8, "ignore_eos": True})),
    (
        "Generate",
        Generate(
            text="hello",
            n=2,
            sampling={"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 1},
            stop={"max_tokens": 6, "stop_strings": ["zz"]},
            logprobs={"output": 3, "prompt": 1},
        ),
    ),
    (
        "Generate",
        Generate(text="hello", sampling={"temperature": 0}, stop={"max_tokens": 4, "min_tokens": 4}),
    ),
    ("Generate", Generate(chat={"messages": [{"role": "user", "content": "hello"}]}, stop=_FEW)),
    ("Generate", Generate(text="hello", beam_search={"num_beams": 2}, stop=_FEW)),
    ("Tokenize", inference_pb2.TokenizeRequest(text="hello \xe9\u4e2d")),
    ("CountTokens", inference_pb2.CountTokensRequest(text="hello")),
    ("CountTokens", inference_pb2.CountTokensRequest(chat={"messages": [{"role": "user", "content": "x"}]})),
    ("Detokenize", inference_pb2.DetokenizeRequest(token_ids=[5, 6, 7])),
    ("Embed", encoder_pb2.EmbedRequest(texts=["hello", "a b c"], pooling="POOLING_NONE")),
    ("Embed", encoder_pb2.EmbedRequest(texts=["hello " * 90], truncate=True)),
    ("Score", encoder_pb2.ScoreRequest(inputs=[{"text": "hello", "pair": "a b"}])),
    ("FillMask", encoder_pb2.FillMaskRequest(texts=[f"a {_MASK} b {_MASK}"], top_k=2)),
    ("GetModelInfo", inference_pb2.GetModelInfoRequest()),
    ("GetServerInfo", inference_pb2.GetServerInfoRequest()),
]
_OF_ENCODERS = {"Embed", "Score", "FillMask"}


class Asked(NamedTuple):
    """A request.

    Attributes:
        request: it, in short.
        status: of its answer.
        sentence: of a refusal.
    """

    request: str
    status: str
    sentence: str


async def ask_all(address: str) -> tuple[list[Asked], list[str]]:
    """Asks a server for all that its kind of model may be asked for.

    Args:
        address: of gRPC.

    Returns:
        What was asked, and what should not have been: sentences.
    """
    async with grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
        info = inference_pb2.GetModelInfoResponse.FromString(
            await _call(channel, "GetModelInfo")(inference_pb2.GetModelInfoRequest(), timeout=_SECONDS)
        )
        asked, wrong = [], []
        for task in info.tasks:
            name = inference_pb2.Task.Name(task).removeprefix("TASK_")
            answers = [await _one(channel, *one) for one in _spelled(_MAIN[name], info)]
            if not any(answer.status == "OK" for answer in answers):
                wrong.append(f"no request of {name} is answered: {answers}")
            asked += answers
        asked += [await _one(channel, *one) for one in _spelled(_MORE, info)]
    wrong += [f"{one}" for one in asked if one.status not in _ANSWERS]
    return asked, wrong


def _spelled(
    requests: list[tuple[str, Message]], info: inference_pb2.GetModelInfoResponse
) -> Iterator[tuple[str, Message]]:
    """The requests with the model's own mask."""
    for method, message in requests:
        if isinstance(message, encoder_pb2.FillMaskRequest) and info.encoder.mask_token:
            texts = [text.replace(_MASK, info.encoder.mask_token) for text in message.texts]
            yield method, encoder_pb2.FillMaskRequest(texts=texts, top_k=2)
        else:
            yield method, message


def _call(channel: grpc.aio.Channel, method: str) -> Any:
    service = "EncoderService" if method in _OF_ENCODERS else "InferenceService"
    return channel.unary_unary(
        f"/longspan.v1.{service}/{method}", request_serializer=lambda message: message.SerializeToString()
    )


async def _one(channel: grpc.aio.Channel, method: str, message: Message) -> Asked:
    name = f"{method} {' '.join(str(message).split())[:120]}"
    try:
        await _call(channel, method)(message, timeout=_SECONDS)
    except grpc.aio.AioRpcError as error:
        return Asked(name, error.code().name, error.details() or "")
    return Asked(name, "OK", "")


def asked_of(address: str) -> tuple[list[Asked], list[str]]:
    """``ask_all`` in a loop of its own."""
    return asyncio.run(ask_all(address))
