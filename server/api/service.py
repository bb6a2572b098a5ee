"""The inference service: each method as one screen of calls into the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from longspan.v1 import inference_pb2, inference_pb2_grpc
from server.access.callers import caller
from server.api import conversion, errors
from server.api.account import Accounts
from server.api.answer import Event, collect
from server.api.checks import check_chat, check_text, check_token_ids, refuse
from server.api.encoder_service import encoder_info
from server.api.errors import Violation
from server.api.generation import Generation
from server.api.interceptor import Context
from server.api.languages import encoder_decoder_info
from server.api.prompt import chat_ids, check_tokenizer, text_ids
from server.api.shown import name_of, shown
from server.api.state import Served, ServerState
from server.messages import Ready
from server.observe.metrics import Metrics
from server.observe.tracing import Traces
from server.text.errors import TooManyTokensError

_T = TypeVar("_T")

_THREAD_TOKENS = 1000
# Tokens that Tokenize tells, at most, unless the context is longer.
_MOST_TOKENS = 1 << 18
# Added to a message at once, with the interpreter's lock held: about a millisecond.
_TOKENS_AT_ONCE = 4096

VERSION = importlib.metadata.version("longspan")


def speculation_info(ready: Ready) -> inference_pb2.SpeculationInfo | None:
    """How tokens are drafted, as clients are told; ``None`` where none are."""
    if (used := ready.speculation) is None:
        return None
    return inference_pb2.SpeculationInfo(
        method=used.method,
        draft_tokens=used.draft_tokens,
        attention_backend=used.attention_backend,
        attention_options=used.attention_options,
    )


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """``longspan.v1.InferenceService``. Its errors are ``ServiceError``s, which the interceptor sends.

    Attributes:
        accounts: of generation requests; the interceptor opens and closes them.
    """

    def __init__(self, state: ServerState, metrics: Metrics, traces: Traces | None = None) -> None:
        self._state = state
        self._metrics = metrics
        self.accounts = Accounts(state, metrics, traces)

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """Generates and answers once."""
        async with aclosing(self.events(request)) as events:
            return await collect(events)

    def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[Event, None]:
        """Generates and streams."""
        return self.events(request.request)

    def events(self, request: inference_pb2.GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of a request, in the call that this task serves, which has an open account."""
        return Generation(request, self._state, self._metrics).events()

    async def Abort(  # noqa: N802
        self, request: inference_pb2.AbortRequest, context: Context
    ) -> inference_pb2.AbortResponse:
        """Ends a request in flight of the same identity."""
        if not self._state.settings.abort:
            raise errors.switched_off("Abort", "--no-abort")
        if not request.request_id:
            raise errors.invalid([Violation("request_id", "is empty; name the request to end")])
        found = self._state.admission.find(caller.get(), request.request_id)
        if found is not None:
            found.abort()
        return inference_pb2.AbortResponse(found=found is not None)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Text or a conversation to token ids."""
        served = self._state.model(request.model)
        try:
            ids = await self._input_ids(request, served, special=not request.without_special_tokens)
        except TooManyTokensError as error:
            sentence = (
                f"has {error.count} tokens; at most {error.most} are told, so send it in parts, or ask "
                "CountTokens"
            )
            raise errors.invalid([Violation(request.WhichOneof("input"), sentence)]) from error

        def tell() -> inference_pb2.TokenizeResponse:
            response = inference_pb2.TokenizeResponse(token_ids=ids)
            for start in range(0, len(ids), _TOKENS_AT_ONCE):
                response.tokens.extend(map(served.tokenizer.token, ids[start : start + _TOKENS_AT_ONCE]))
            return response

        return await self._beside(ids, tell)

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Token ids to text; ids that the model has and the tokenizer doesn't name are no text."""
        served = self._state.model(request.model)
        check_tokenizer(served)
        count, most = len(request.token_ids), served.ready.context_length
        if count > most:
            sentence = f"has {count} ids; at most {most}, this model's context, are taken at a time"
            raise errors.invalid([Violation("token_ids", sentence)])
        refuse(check_token_ids("token_ids", request.token_ids, served.ready.vocabulary_size))
        ids = list(request.token_ids)
        skip = not request.keep_special_tokens
        text = await self._beside(ids, lambda: served.tokenizer.decode_aside(ids, skip_special_tokens=skip))
        return inference_pb2.DetokenizeResponse(text=text)

    async def CountTokens(  # noqa: N802
        self, request: inference_pb2.CountTokensRequest, context: Context
    ) -> inference_pb2.CountTokensResponse:
        """How many tokens a prompt has."""
        served = self._state.model(request.model)
        try:
            count = len(await self._input_ids(request, served, special=True))
        except TooManyTokensError as error:
            count = error.count
        return inference_pb2.CountTokensResponse(
            token_count=count, context_length=served.ready.context_length
        )

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The models that this server can be asked for."""
        return inference_pb2.ListModelsResponse(models=[self._state.model("").name])

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        """One model."""
        served = self._state.model(request.model)
        ready = served.ready
        return inference_pb2.GetModelInfoResponse(
            name=served.name,
            source=name_of(served.source),
            architecture=ready.architecture,
            parameters=ready.parameters,
            layers=ready.layers,
            vocabulary_size=ready.vocabulary_size,
            context_length=ready.context_length,
            dtype=ready.dtype,
            kv_dtype=ready.kv_dtype,
            attention=inference_pb2.AttentionInfo(
                backend=ready.attention_backend,
                pattern=ready.attention_pattern,
                kernel=ready.attention_kernel,
                reason=ready.attention_reason,
                options=ready.attention_options,
            ),
            executor=inference_pb2.ExecutorInfo(name=ready.executor, reason=ready.executor_reason),
            eos_token_ids=served.generation.eos_token_ids,
            default_sampling=conversion.sampling_params(served.generation.sampling),
            has_chat_template=served.tokenizer.has_chat_template,
            limits=self._state.limits,
            tasks=[f"TASK_{task.name}" for task in served.tasks],
            encoder=encoder_info(served),
            encoder_decoder=encoder_decoder_info(served),
            speculation=speculation_info(ready),
            draft_model="" if ready.speculation is None else name_of(ready.speculation.draft_model),
        )

    async def GetServerInfo(  # noqa: N802
        self, request: inference_pb2.GetServerInfoRequest, context: Context
    ) -> inference_pb2.GetServerInfoResponse:
        """The server, also while it loads or drains."""
        state = self._state
        if not state.settings.server_info:
            raise errors.switched_off("GetServerInfo", "--no-server-info")
        versions = {"python": platform.python_version(), "grpcio": grpc.__version__}
        response = inference_pb2.GetServerInfoResponse(
            version=VERSION,
            versions=versions,
            uptime_seconds=0.0 if state.ready_since is None else time.monotonic() - state.ready_since,
            settings=shown(state.settings),
        )
        if state.served is not None:
            ready, stats = state.served.ready, state.served.engine.stats
            response.versions.update(ready.versions)
            response.device = ready.device
            response.load.CopyFrom(
                inference_pb2.Load(
                    running=stats.running,
                    waiting=stats.waiting,
                    page_size=ready.page_size,
                    pages_total=ready.pages_total,
                    pages_used=stats.pages_used,
                    pages_cached=stats.pages_cached,
                    kv_bytes=ready.kv_bytes,
                )
            )
        return response

    async def _input_ids(self, request: Any, served: Served, *, special: bool) -> list[int]:
        """Token ids of a request's ``input``; an empty text has none.

        Raises:
            ServiceError: there is no input, or too much; the model has no tokenizer, or the chat template
                refuses it.
            TooManyTokensError: there are more than ``Tokenize`` tells.
        """
        check_tokenizer(served)
        as_text, most = request.special_tokens_as_text, max(served.ready.context_length, _MOST_TOKENS)
        match request.WhichOneof("input"):
            case "text":
                refuse(check_text(request.text, self._state.limits.text_bytes))
                return await text_ids(
                    request.text, served, self._state, most, special=special, as_text=as_text
                )
            case "chat":
                refuse(check_chat(request.chat, self._state.limits))
                return await chat_ids(request.chat, served, self._state, most, as_text=as_text)
            case _:
                raise errors.invalid([Violation("input", "is not set; send text or chat")])

    async def _beside(self, ids: Sequence[int], work: Callable[[], _T]) -> _T:
        """Does something with token ids; with many, in a thread, since it would hold up every stream."""
        return work() if len(ids) <= _THREAD_TOKENS else await self._state.text_work.run(work, len(ids))
