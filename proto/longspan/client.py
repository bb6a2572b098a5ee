"""The synchronous client. Thread-safe; one connection serves any number of calls at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2

from longspan.channel import SERVICE, Metadata
from longspan.connected import Connected
from longspan.encoding import (
    EmbedOptions,
    FillMaskOptions,
    ScoreOptions,
    Texts,
    build_embed,
    build_fill_mask,
    build_score,
)
from longspan.errors import LongspanError, UnavailableError, from_rpc_error
from longspan.request import (
    GenerateOptions,
    Message,
    Prompt,
    build_count,
    build_detokenize,
    build_request,
    build_tokenize,
)
from longspan.results import Delta, Generation, StreamState
from longspan.v1 import encoder_pb2, inference_pb2

Response = TypeVar("Response", bound=ProtoMessage)

_POLL_SECONDS = 0.1


class Stream(StreamState):
    """A generation as it happens: iterate for its deltas, once.

    Leaving the loop early, by ``break`` or an exception, cancels the request on the server; so does the end
    of a ``with`` block, and ``close`` from any thread.

    Iterating raises ``LongspanError``: the call failed, which for a request that the server refuses is at the
    first step.
    """

    def __iter__(self) -> Iterator[Delta]:
        try:
            for response in self._call:
                delta = self._take(response)
                if delta is not None:
                    yield delta
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._server) from None
        finally:
            self.close()

    def close(self) -> None:
        """Cancels the request on the server unless it has ended; a waiting loop raises ``CancelledError``."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client(Connected[grpc.Channel]):
    """A connection to one server. Every call raises ``LongspanError`` or one of its subclasses.

    ``timeout`` is in seconds; when it has passed, the server stops working on the call too. Without one
    there is no limit. The attribute ``timeout`` may be changed for later calls.
    """

    _api: ClassVar[Any] = grpc

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates, and waits for the complete answer.

        Args:
            prompt: text, token ids, or messages for the model's chat template.
            timeout: seconds for the whole call.
            **options: see ``GenerateOptions``.
        """
        request = build_request(prompt, options)
        affinity = self._affinity.of(request)
        return Generation.from_message(self._ask(self._stub.Generate, request, timeout, affinity))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream:
        """Generates, and gives text as it appears: ``for delta in client.stream(...): print(delta.text)``.

        Args:
            prompt: text, token ids, or messages for the model's chat template.
            timeout: seconds for the whole stream.
            **options: see ``GenerateOptions``.
        """
        return Stream(self._streamed(prompt, timeout, options), self._server)

    def embed(
        self, texts: Texts, *, timeout: float | None = None, **options: Unpack[EmbedOptions]
    ) -> encoder_pb2.EmbedResponse:
        """Vectors of texts: ``[embedding.values for embedding in client.embed(texts).embeddings]``.

        Args:
            texts: one text or several, or token ids of each.
            timeout: seconds.
            **options: see ``EmbedOptions``.
        """
        return self._ask(self._encoders.Embed, build_embed(texts, options), timeout)

    def score(
        self,
        inputs: Sequence[str | tuple[str, str]],
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> encoder_pb2.ScoreResponse:
        """Scores of a classifier's or reranker's labels: ``.labels``, and of each text ``.scores[i].logits``.

        Args:
            inputs: texts, or pairs ``(query, document)``.
            timeout: seconds.
            **options: ``model``, ``truncate`` and ``request_id``, as of ``embed``.
        """
        return self._ask(self._encoders.Score, build_score(inputs, options), timeout)

    def fill_mask(
        self, texts: str | Sequence[str], *, timeout: float | None = None, **options: Unpack[FillMaskOptions]
    ) -> encoder_pb2.FillMaskResponse:
        """The most likely tokens for masks: ``.texts[i].masks[j].tokens``, best first.

        Args:
            texts: one text or several, whose masks are spelled as ``model_info().encoder.mask_token``.
            timeout: seconds.
            **options: see ``FillMaskOptions``.
        """
        return self._ask(self._encoders.FillMask, build_fill_mask(texts, options), timeout)

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Ends a running request of the same identity; ``False`` if none has this id."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        return self._ask(self._stub.Abort, request, timeout).found

    def tokenize(
        self,
        value: str | Sequence[Message],
        *,
        model: str = "",
        special_tokens: bool = True,
        special_tokens_as_text: bool = False,
        timeout: float | None = None,
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of text or messages (``.token_ids``), and their entries in the vocabulary (``.tokens``).

        Args:
            value: text, or messages for the model's chat template.
            model: its name; the server's only model if left out.
            special_tokens: adds those that the tokenizer puts around text.
            special_tokens_as_text: those that the text or the messages spell out stay text.
            timeout: seconds.
        """
        request = build_tokenize(
            value, model, special_tokens=special_tokens, special_tokens_as_text=special_tokens_as_text
        )
        return self._ask(self._stub.Tokenize, request, timeout)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Text of token ids."""
        request = build_detokenize(token_ids, model, keep_special_tokens=keep_special_tokens)
        return self._ask(self._stub.Detokenize, request, timeout).text

    def count_tokens(
        self,
        value: str | Sequence[Message],
        *,
        model: str = "",
        special_tokens_as_text: bool = False,
        timeout: float | None = None,
    ) -> inference_pb2.CountTokensResponse:
        """How many tokens a prompt has (``.token_count``), and how many fit (``.context_length``).

        Args:
            value: text, or messages for the model's chat template.
            model: its name; the server's only model if left out.
            special_tokens_as_text: special tokens that the text or the messages spell out stay text.
            timeout: seconds.
        """
        request = build_count(value, model, special_tokens_as_text=special_tokens_as_text)
        return self._ask(self._stub.CountTokens, request, timeout)

    def models(self, *, timeout: float | None = None) -> list[str]:
        """Names of the models that the server can be asked for."""
        return list(self._ask(self._stub.ListModels, inference_pb2.ListModelsRequest(), timeout).models)

    def model_info(
        self, model: str = "", *, timeout: float | None = None
    ) -> inference_pb2.GetModelInfoResponse:
        """A model's architecture, limits and attention."""
        return self._ask(self._stub.GetModelInfo, inference_pb2.GetModelInfoRequest(model=model), timeout)

    def server_info(self, *, timeout: float | None = None) -> inference_pb2.GetServerInfoResponse:
        """The server's version, settings in force, and load at this moment."""
        return self._ask(self._stub.GetServerInfo, inference_pb2.GetServerInfoRequest(), timeout)

    def health(self, *, timeout: float | None = None) -> bool:
        """Whether the server is ready; ``False`` while it loads, drains, or is without its engine.

        Raises:
            UnavailableError: no server answers.
        """
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        status = self._ask(self._health.Check, request, timeout).status
        return status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns when the server is ready, whether or not it answers yet.

        Raises:
            UnavailableError: it was not ready within ``timeout`` seconds; says what it lacked.
        """
        limit = self._limit(timeout)
        end = None if limit is None else time.monotonic() + limit
        while True:
            left = None if end is None else max(0.001, end - time.monotonic())
            try:
                if self.health(timeout=5.0 if left is None else min(5.0, left)):
                    return
                lacking = (
                    f"The server at {self._server} is up but not ready: it loads, drains, or has no engine."
                )
            except LongspanError as error:
                lacking = str(error)
            if end is not None and time.monotonic() + _POLL_SECONDS >= end:
                raise UnavailableError(f"Not ready within {limit:g} s. {lacking}")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Closes the connection, unless it was given; calls that are running are cancelled."""
        if self._own_channel:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        method: grpc.UnaryUnaryMultiCallable[Any, Response],
        request: ProtoMessage,
        timeout: float | None,
        affinity: Metadata = (),
    ) -> Response:
        done = threading.Event()
        metadata = (*self._headers, *affinity)
        call: Any = method.future(request, timeout=self._limit(timeout), metadata=metadata)
        try:
            call.add_done_callback(lambda _: done.set())
            done.wait()  # Ctrl-C while gRPC itself waits could leave its locks in disorder
            return call.result()
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._server) from None
        finally:
            call.cancel()  # an exception from outside, like Ctrl-C, must not leave the server working
