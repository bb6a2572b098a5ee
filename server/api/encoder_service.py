"""The encoders' service: each method as one screen of calls into the rest."""

from __future__ import annotations

import functools
from array import array

from longspan.v1 import encoder_pb2, encoder_pb2_grpc
from server.access.callers import caller
from server.api import encoder_errors, errors
from server.api.account import Accounts, account
from server.api.encoder_checks import check_embed
from server.api.encoding import Encoded, Encoding
from server.api.errors import Violation
from server.api.interceptor import Context
from server.api.prompt import check_tokenizer
from server.api.state import Served, ServerState
from server.encoder_messages import Encode, EncoderInfo, Pooling, Task
from server.observe.logging import request_id
from server.text.encoder_texts import EncoderText, TooLongError
from server.text.errors import TextError

# Vectors of all tokens of a request, at most: more would fill the memory of server and client.
_MOST_BYTES = 64 << 20


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """``longspan.v1.EncoderService``. Its errors are ``ServiceError``s, which the interceptor sends."""

    def __init__(self, state: ServerState, accounts: Accounts) -> None:
        self._state = state
        self._accounts = accounts

    async def Embed(  # noqa: N802
        self, request: encoder_pb2.EmbedRequest, context: Context
    ) -> encoder_pb2.EmbedResponse:
        """Texts to embeddings."""
        account.get().model, account.get().operation = request.model, "embeddings"
        served = self._state.model(request.model)
        served.check_task(Task.EMBED)
        assert served.ready.encoder is not None
        check_embed(request, served.ready, self._state.limits)
        template = _template(request, served.ready.encoder)
        encoded = await self._encode(request, served, template)
        return encoder_pb2.EmbedResponse(
            request_id=request_id.get(),
            model=served.name,
            embeddings=_embeddings(encoded, whole=template.pooling is Pooling.NONE),
            usage=encoded.usage,
            timings=encoded.timings,
        )

    async def _encode(self, request: encoder_pb2.EmbedRequest, served: Served, template: Encode) -> Encoded:
        encoding = Encoding(
            request_id.get(), caller.get(), self._state, self._accounts.metrics, account.get()
        )
        if request.texts:
            check_tokenizer(served)
        texts = functools.partial(_texts, request, served, template.pooling)
        count = len(request.texts) or len(request.token_ids)
        return await encoding.run(served, texts, count, sum(map(len, request.texts)), template)


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


def _texts(request: encoder_pb2.EmbedRequest, served: Served, pooling: Pooling) -> list[EncoderText]:
    """The texts' tokens, each known to the model.

    Raises:
        ServiceError: a text has too many or none, or there would be too many vectors.
    """
    ready, most = served.ready, served.ready.context_length
    if request.token_ids:
        texts = [EncoderText(list(ids.ids), []) for ids in request.token_ids]
    else:
        try:
            texts = served.tokenizer.encoder_texts(list(request.texts), most=most, truncate=request.truncate)
        except TooLongError as error:
            raise encoder_errors.text_too_long(f"texts[{error.index}]", error.count, most) from error
        except TextError as error:
            raise errors.invalid([Violation(error.field, str(error))]) from error
    for index, text in enumerate(texts):
        if not text.tokens:
            raise errors.invalid([Violation(f"texts[{index}]", "has no tokens; send other characters")])
        if max(text.tokens) >= ready.vocabulary_size:  # some tokenizers know more tokens than their model
            sentence = f"has token {max(text.tokens)}, which the model does not know"
            raise errors.invalid([Violation(f"texts[{index}]", sentence)])
    if pooling is Pooling.NONE and ready.encoder is not None:
        size = 4 * ready.encoder.embedding_size * sum(len(text.tokens) for text in texts)
        if size > _MOST_BYTES:
            most_mib = _MOST_BYTES >> 20
            sentence = (
                f"asks for {size >> 20} MiB of vectors; at most {most_mib} are sent, so send fewer texts"
            )
            raise errors.invalid([Violation("pooling", sentence)])
    return texts


def _embeddings(encoded: Encoded, *, whole: bool) -> list[encoder_pb2.Embedding]:
    found = []
    for text, output in zip(encoded.texts, encoded.outputs, strict=True):
        embedding = encoder_pb2.Embedding(tokens=len(text.tokens), truncated=text.truncated)
        embedding.values.extend(array("f", output.values))
        if whole:
            embedding.token_ids.extend(text.tokens)
        found.append(embedding)
    return found


def encoder_info(info: EncoderInfo) -> encoder_pb2.EncoderInfo:
    """What ``GetModelInfo`` tells of an encoder."""
    return encoder_pb2.EncoderInfo(
        embedding_size=info.embedding_size,
        pooling=f"POOLING_{info.pooling.name}",
        normalized=info.normalized,
    )
