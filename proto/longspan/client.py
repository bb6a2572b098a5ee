"""The synchronous client. Thread-safe; one connection serves any number of calls at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longspan.affinity import Affinity
from longspan.channel import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    SERVICE,
    ConnectOptions,
    Metadata,
    connect,
    headers,
    target,
)
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
from longspan.limits import seconds
from longspan.request import GenerateOptions, Message, Prompt, build_detokenize, build_request, set_input
from longspan.results import Delta, Generation, StreamState
from longspan.v1 import encoder_pb2, encoder_pb2_grpc, inference_pb2, inference_pb2_grpc

Response = TypeVar("Response", bound=ProtoMessage)

_POLL_SECONDS = 0.1


class Stream(StreamState):
    """A generation as it happens: iterate for its deltas, once.

    Leaving the loop early, by ``break`` or an exception, cancels the request on the server; so does the end
    of a ``with`` block, and ``close`` from any thread.

    Iterating raises ``LongspanError``: the call failed, which for a request that the server refuses is at the
    first step.
    """

    def __init__(self, call: Any, server: str) -> None:
        super().__init__()
        self._call = call
        self._server = server

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


class Client:
    """A connection to one server. Every call raises ``LongspanError`` or one of its subclasses.

    ``timeout`` is in seconds; when it has passed, the server stops working on the call too. Without one
    there is no limit. The attribute ``timeout`` may be changed for later calls.
    """

    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        timeout: float | None = None,
        channel: grpc.Channel | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Prepares the connection; the first call makes it.

        Args:
            host: name or address of the server, or a target of gRPC's like ``dns:///name``.
            port: its gRPC port.
            timeout: for calls that give none of their own.
            channel: one of your own, which ``close`` leaves open; host and port then only name the server in
                messages.
            **options: see ``ConnectOptions``.

        Raises:
            TypeError: an option has a name that there is not.
            ValueError: the options contradict one another, or one is not what it must be.
        """
        self._server = target(host, port)
        self.timeout = seconds(timeout)
        self._headers = headers(options)
        self._affinity = Affinity(options.get("affinity"))
        self._own_channel = channel is None
        self._channel = connect(grpc, self._server, channel, options)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._encoders = encoder_pb2_grpc.EncoderServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

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
        request = inference_pb2.StreamGenerateRequest(request=build_request(prompt, options))
        metadata = (*self._headers, *self._affinity.of(request.request))
        call = self._stub.StreamGenerate(request, timeout=self._limit(timeout), metadata=metadata)
        return Stream(call, self._server)

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
        request = inference_pb2.TokenizeRequest(
            model=model,
            without_special_tokens=not special_tokens,
            special_tokens_as_text=special_tokens_as_text,
        )
        set_input(request, value)
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
        request = inference_pb2.CountTokensRequest(model=model, special_tokens_as_text=special_tokens_as_text)
        set_input(request, value)
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

    def _limit(self, timeout: float | None) -> float | None:
        return seconds(self.timeout if timeout is None else timeout)

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
