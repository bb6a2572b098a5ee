"""The encoders' service: each method as one screen of calls into the rest."""

from __future__ import annotations

import functools
from array import array
from typing import TypedDict

from longspan.v1 import encoder_pb2, encoder_pb2_grpc, types_pb2
from server.access.callers import caller
from server.api.account import Accounts, account
from server.api.encoder_checks import check_embed, check_fill_mask, check_score
from server.api.encoder_inputs import tokens_of
from server.api.encoding import Encoded, Encoding
from server.api.interceptor import Context
from server.api.masks import filled_texts, mask_id, masked_texts, top_k_of
from server.api.prompt import check_tokenizer
from server.api.state import Served, ServerState
from server.api.vector_bytes import Holder
from server.encoder_messages import Encode, EncoderInfo, Pooling, Task
from server.observe.logging import request_id
from server.text.encoder_texts import EncoderText, Input


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """``longspan.v1.EncoderService``. Its errors are ``ServiceError``s, which the interceptor sends."""

    def __init__(self, state: ServerState, accounts: Accounts) -> None:
        self._state = state
        self._accounts = accounts

    async def Embed(  # noqa: N802
        self, request: encoder_pb2.EmbedRequest, context: Context
    ) -> encoder_pb2.EmbedResponse:
        """Texts to embeddings."""
        served = self._served(request.model, "embeddings", Task.EMBED)
        assert served.ready.encoder is not None
        check_embed(request, served.ready, self._state.limits)
        template = _template(request, served.ready.encoder)
        encoded = await self._embedded(request, served, template, context)
        return encoder_pb2.EmbedResponse(
            embeddings=_embeddings(encoded, whole=template.pooling is Pooling.NONE), **_tail(served, encoded)
        )

    async def Score(  # noqa: N802
        self, request: encoder_pb2.ScoreRequest, context: Context
    ) -> encoder_pb2.ScoreResponse:
        """Texts or pairs to scores of labels."""
        served = self._served(request.model, "score", Task.SCORE)
        assert served.ready.encoder is not None
        check_score(request, self._state.limits)
        check_tokenizer(served)
        inputs: list[Input] = [
            (one.text, one.pair) if one.HasField("pair") else one.text for one in request.inputs
        ]
        tokenize = functools.partial(tokens_of, inputs, "inputs", served, truncate=request.truncate)
        size = sum(len(one.text) + len(one.pair) for one in request.inputs)
        template = Encode(id=0, task=Task.SCORE, turn=0, tokens=[])
        encoded = await self._encoding(context).run(served, tokenize, len(inputs), size, template)
        labels = served.ready.encoder.labels
        scores = _scores(encoded, len(labels))
        return encoder_pb2.ScoreResponse(labels=labels, scores=scores, **_tail(served, encoded))

    async def FillMask(  # noqa: N802
        self, request: encoder_pb2.FillMaskRequest, context: Context
    ) -> encoder_pb2.FillMaskResponse:
        """Texts with masks to the most likely tokens in their places."""
        served = self._served(request.model, "fill_mask", Task.FILL)
        top_k = top_k_of(request, self._state.limits)
        check_fill_mask(request, top_k, served.ready, self._state.limits)
        texts = list(request.texts)
        tokenize = functools.partial(masked_texts, texts, served, truncate=request.truncate, top_k=top_k)
        template = Encode(id=0, task=Task.FILL, turn=0, tokens=[], mask_token=mask_id(served), top_k=top_k)
        encoded = await self._encoding(context).run(
            served, tokenize, len(texts), sum(map(len, texts)), template
        )
        filled = filled_texts(encoded, served, top_k)
        return encoder_pb2.FillMaskResponse(texts=filled, **_tail(served, encoded))

    async def _embedded(
        self, request: encoder_pb2.EmbedRequest, served: Served, template: Encode, context: Context
    ) -> Encoded:
        if request.texts:
            check_tokenizer(served)
        assert served.ready.encoder is not None
        prompt = _prompt(request, served.ready.encoder)

        def tokenize() -> list[EncoderText]:
            if request.texts:
                begun = [prompt + text for text in request.texts]
                return tokens_of(begun, "texts", served, truncate=request.truncate)
            return [EncoderText(list(ids.ids), []) for ids in request.token_ids]

        count = len(request.texts) or len(request.token_ids)
        size = sum(len(prompt) + len(text) for text in request.texts)
        return await self._encoding(context).run(served, tokenize, count, size, template)

    def _served(self, model: str, operation: str, task: Task) -> Served:
        """The model that a call asks for, which is noted in the call's account."""
        account.get().model, account.get().operation = model, operation
        served = self._state.model(model)
        served.check_task(task)
        return served

    def _encoding(self, context: Context) -> Encoding:
        """That of the call which this task serves."""
        holder = Holder.of(caller.get().identity.name, context.peer())
        return Encoding(holder, self._state, self._accounts.metrics)


class _Tail(TypedDict):
    """The fields that all answers have."""

    request_id: str
    model: str
    usage: types_pb2.Usage
    timings: types_pb2.Timings


def _tail(served: Served, encoded: Encoded) -> _Tail:
    return {
        "request_id": request_id.get(),
        "model": served.name,
        "usage": encoded.usage,
        "timings": encoded.timings,
    }


def _template(request: encoder_pb2.EmbedRequest, info: EncoderInfo) -> Encode:
    named = encoder_pb2.Pooling.Name(request.pooling).removeprefix("POOLING_")
    return Encode(
        id=0,
        task=Task.EMBED,
        turn=0,
        tokens=[],
        pooling=info.pooling if named == "UNSPECIFIED" else Pooling[named],
        normalize=request.normalize if request.HasField("normalize") else info.normalized,
    )


def _prompt(request: encoder_pb2.EmbedRequest, info: EncoderInfo) -> str:
    """The text with which the request's texts begin, whose name was checked."""
    named = request.prompt_name if request.HasField("prompt_name") else info.default_prompt
    return info.prompts[named] if named else ""


def _embeddings(encoded: Encoded, *, whole: bool) -> list[encoder_pb2.Embedding]:
    found = []
    for text, output in zip(encoded.texts, encoded.outputs, strict=True):
        embedding = encoder_pb2.Embedding(tokens=len(text.tokens), truncated=text.truncated)
        embedding.values.extend(array("f", output.values))
        if whole:
            embedding.token_ids.extend(text.tokens)
        found.append(embedding)
    return found


def _scores(encoded: Encoded, labels: int) -> list[encoder_pb2.Scores]:
    found = []
    for text, output in zip(encoded.texts, encoded.outputs, strict=True):
        values = array("f", output.values)
        found.append(
            encoder_pb2.Scores(
                logits=values[:labels],
                probabilities=values[labels:],
                tokens=len(text.tokens),
                truncated=text.truncated,
            )
        )
    return found


def encoder_info(served: Served) -> encoder_pb2.EncoderInfo | None:
    """What ``GetModelInfo`` tells of an encoder; ``None`` of a decoder."""
    info = served.ready.encoder
    if info is None:
        return None
    return encoder_pb2.EncoderInfo(
        embedding_size=info.embedding_size,
        pooling=f"POOLING_{info.pooling.name}",
        normalized=info.normalized,
        labels=info.labels,
        mask_token=served.tokenizer.mask_token if Task.FILL in served.tasks else None,
        prompts=info.prompts,
        default_prompt_name=info.default_prompt,
    )
