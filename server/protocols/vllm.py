"""``vllm.grpc.engine.VllmEngine``: what the SMG gateway, with OpenAI's HTTP API, asks of an engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2 as common

from longspan.v1 import encoder_pb2, types_pb2
from server.access.callers import caller
from server.api import conversion, errors
from server.api.checks import valid_request_id
from server.api.encoder_service import EncoderServicer
from server.api.errors import Violation
from server.api.interceptor import Context
from server.api.other_service import OtherService, other_service
from server.api.prompt import check_tokenizer
from server.api.service import VERSION, InferenceServicer
from server.api.shown import name_of
from server.encoder_messages import Task
from server.observe.logging import request_id
from server.protocols import vllm_kv_events
from server.protocols.vllm_answer import VllmAnswer
from server.protocols.vllm_request import generate_request
from server.text.bundle import bundle
from server.text.tokenizer import Tokenizer

# As much as the gateway takes of the tokenizer at a time.
_CHUNK_BYTES = 64 << 10


def service(inference: InferenceServicer) -> OtherService:
    """The service, whose requests ``inference`` answers."""
    descriptor = pb.DESCRIPTOR.services_by_name["VllmEngine"]
    return other_service(descriptor, VllmServicer(inference), accounted=("Generate", "Embed"))


class VllmServicer:
    """Its methods; those that it lacks are refused. Its errors are ``ServiceError``s."""

    def __init__(self, inference: InferenceServicer) -> None:
        self._inference = inference
        self._state = inference.accounts.state
        self._encoders = EncoderServicer(self._state, inference.accounts)
        self._bundle: tuple[Tokenizer, asyncio.Task[tuple[bytes, str]]] | None = None

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Generates; chunks only where the request streams."""
        _take_name(request.request_id)
        served = self._state.model("")
        served.check_task(Task.GENERATE)
        own = generate_request(request, served.longest_prompt)
        answer = VllmAnswer(request, own.token_ids.ids)
        async with aclosing(self._inference.events(own)) as events:
            async for message in answer.messages(events):
                yield message

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """One prompt's vector, as the model's makers pool it."""
        _take_name(request.request_id)
        ids = types_pb2.TokenIds(ids=request.tokenized.input_ids)
        own = encoder_pb2.EmbedRequest(token_ids=[ids], request_id=request.request_id)
        answer = await self._encoders.Embed(own, context)
        vector = answer.embeddings[0].values
        return pb.EmbedResponse(
            embedding=vector, prompt_tokens=answer.usage.prompt_tokens, embedding_dim=len(vector)
        )

    async def HealthCheck(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        """Whether requests are answered, and if not, why.

        Raises:
            ServiceError: the model is being loaded. To the gateway any answer means a worker that is there,
                and it asks for its model only once.
        """
        if self._state.phase == "loading":
            raise self._state.unavailable()
        healthy = self._state.phase == "ready"
        message = "" if healthy else self._state.unavailable().message
        return pb.HealthCheckResponse(healthy=healthy, message=message)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        """Ends requests in flight of the same identity, those that there are."""
        if not self._state.settings.abort:
            raise errors.switched_off("Abort", "--no-abort")
        for name in request.request_ids:
            if (found := self._state.admission.find(caller.get(), name)) is not None:
                found.abort()
        return pb.AbortResponse()

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        """The model; of its tokenizer no path, since the gateway may be on another machine."""
        served = self._state.model("")
        ready = served.ready
        sampling = conversion.sampling_params(served.generation.sampling)
        defaults = json_format.MessageToDict(sampling, preserving_proto_field_name=True)
        return pb.GetModelInfoResponse(
            model_path=name_of(served.source),
            is_generation=Task.GENERATE in served.tasks,
            max_context_length=ready.context_length,
            vocab_size=ready.vocabulary_size,
            served_model_name=served.name,
            architectures=[ready.architecture],
            eos_token_ids=served.generation.eos_token_ids,
            max_req_input_len=served.longest_prompt,
            default_sampling_params_json=json.dumps(defaults),
        )

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """The server: what of it the gateway labels its workers with."""
        state = self._state
        if not state.settings.server_info:
            raise errors.switched_off("GetServerInfo", "--no-server-info")
        info = pb.GetServerInfoResponse(
            active_requests=len(state.admission),
            uptime_seconds=0.0 if state.ready_since is None else time.monotonic() - state.ready_since,
            server_type="longspan",
            data_parallel_size=1,
        )
        if state.served is not None:
            ready = state.served.ready
            info.kv_cache_dtype, info.block_size = ready.kv_dtype, ready.page_size
            info.attention_backend, info.model_dtype = ready.attention_backend, ready.dtype
        return info

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:  # noqa: N802
        """The engine's load after its last step: the section core, whatever others are asked for."""
        if request.dp_rank:
            raise errors.invalid([Violation("dp_rank", f"is {request.dp_rank}; this server has rank 0 only")])
        served = self._state.model("")
        ready, stats = served.ready, served.engine.stats
        load = pb.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting,
            num_used_tokens=stats.pages_used * ready.page_size,
            max_total_num_tokens=ready.pages_total * ready.page_size,
            token_usage=stats.pages_used / max(ready.pages_total, 1),
            cache_hit_rate=stats.prefix_hits / max(stats.prefix_queries, 1),
            max_running_requests=ready.max_running,
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=VERSION, dp_rank_count=1, loads=[load]
        )

    async def GetTokenizer(  # noqa: N802
        self, request: common.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[common.GetTokenizerChunk]:
        """The tokenizer's files as a zip archive, with its SHA-256 in the last chunk."""
        served = self._state.model("")
        check_tokenizer(served)
        data, digest = await self._bundled(served.tokenizer)
        for start in range(0, len(data), _CHUNK_BYTES):
            last = start + _CHUNK_BYTES >= len(data)
            chunk = data[start : start + _CHUNK_BYTES]
            yield common.GetTokenizerChunk(data=chunk, sha256=digest if last else "")

    async def SubscribeKvEvents(  # noqa: N802
        self, request: common.SubscribeKvEventsRequest, context: Context
    ) -> AsyncIterator[common.KvEventBatch]:
        """Which prompts' pages are in the prefix cache, and what becomes of them."""
        log = self._state.kv_log
        if log is None:
            raise vllm_kv_events.switched_off()
        vllm_kv_events.check_allowed(caller.get().identity)
        self._state.model("").check_task(Task.GENERATE)
        async with aclosing(vllm_kv_events.batches(log, request.start_sequence_number)) as batches:
            async for batch in batches:
                yield batch

    async def _bundled(self, tokenizer: Tokenizer) -> tuple[bytes, str]:
        """The archive and its SHA-256, made once, however many ask at a time and leave meanwhile."""
        made = self._bundle
        if made is None or made[0] is not tokenizer or _failed(made[1]):
            made = self._bundle = tokenizer, asyncio.create_task(asyncio.to_thread(_bundle, tokenizer))
        return await asyncio.shield(made[1])


def _bundle(tokenizer: Tokenizer) -> tuple[bytes, str]:
    data = bundle(tokenizer)
    return data, hashlib.sha256(data).hexdigest()


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _take_name(given: str) -> None:
    """Calls the request by its client's name in logs and for Abort; another is refused later."""
    if given and valid_request_id(given):
        request_id.set(given)
