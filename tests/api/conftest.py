"""The real gRPC server on a free port, in this process, with a small tokenizer and the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longspan.v1 import inference_pb2, inference_pb2_grpc
from server.access.callers import Callers
from server.api.health import HealthServicer
from server.api.listen import Listener, Parts
from server.api.service import InferenceServicer
from server.api.state import Served, ServerState
from server.messages import Sampling
from server.models.generation import Generation
from server.observe.metrics import GrpcMetrics, Metrics
from server.protocols.load import service_names, services
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.api.fake_engine import READY, FakeEngine

END = 256
GENERATION = Generation([END], Sampling(temperature=0.25, top_k=40, top_p=0.75, repetition_penalty=1.5))
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role in ('system', 'user', 'assistant') %}{{ m.role }}:{{ m.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('not that') }}{% endif %}"
)


async def always() -> bool:
    """An answer to probes."""
    return True


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Token n is byte n, token 256 is the end; 257 to 299 have no entry."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2's letters for bytes: those that print stand for themselves, the others follow from U+0100 on.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    of_byte = {byte: chr(byte) for byte in printing}
    of_byte |= {
        byte: chr(256 + index) for index, byte in enumerate(b for b in range(256) if b not in of_byte)
    }
    assert sorted(of_byte.values()) == letters
    backend = Backend(models.BPE(vocab={of_byte[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@dataclass
class Running:
    """A server under test and a client of it."""

    state: ServerState
    engine: FakeEngine
    metrics: Metrics
    health: HealthServicer
    service: InferenceServicer
    server: Listener
    channel: aio.Channel
    stub: inference_pb2_grpc.InferenceServiceAsyncStub
    port: int

    @property
    def registry(self) -> CollectorRegistry:
        return self.metrics.registry

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value, 0 where it has none."""
        if not name.startswith("longspan_grpc"):
            labels["model_name"] = "fake"
        return self.registry.get_sample_value(name, labels) or 0.0

    async def generate(self, text: str = "hello", **fields) -> inference_pb2.GenerateResponse:
        return await self.stub.Generate(ask(text, **fields))

    async def refused(self, request: inference_pb2.GenerateRequest) -> aio.AioRpcError:
        """The error with which a request is refused, the same for both ways to ask."""
        with pytest.raises(aio.AioRpcError) as unary:
            await self.stub.Generate(request)
        with pytest.raises(aio.AioRpcError) as stream:
            await self.events(request)
        assert (unary.value.code(), unary.value.details()) == (stream.value.code(), stream.value.details())
        assert not self.engine.submitted, "it must not reach the engine"
        return unary.value

    async def events(
        self, request: inference_pb2.GenerateRequest, **options
    ) -> list[inference_pb2.StreamGenerateResponse]:
        wrapped = inference_pb2.StreamGenerateRequest(request=request)
        call = self.stub.StreamGenerate(wrapped, **options)
        return [event async for event in call]


def ask(text: str | None = "hello", **fields) -> inference_pb2.GenerateRequest:
    """A request of at most 5 tokens, unless ``fields`` say otherwise."""
    fields.setdefault("stop", {"max_tokens": 5})
    fields.setdefault("sampling", {"seed": 0})
    if text is not None:
        fields["text"] = text
    return inference_pb2.GenerateRequest(**fields)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for a condition that other tasks bring about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (no event tells of it)
            await asyncio.sleep(0.001)


def details(error: aio.AioRpcError) -> dict[str, object]:
    """The rich details of an error by their message's name."""
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        assert packed.Unpack(message)
        found[name] = message
    return found


async def call_raw(running: Running, method: str, payload: bytes) -> aio.AioRpcError:
    """The error with which bytes are refused."""
    path = f"/longspan.v1.InferenceService/{method}"
    if method.startswith("Stream"):
        answer = running.channel.unary_stream(path)(payload).read()
    else:
        answer = running.channel.unary_unary(path)(payload)
    with pytest.raises(aio.AioRpcError) as caught:
        await answer
    return caught.value


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def settings():
    return Settings(max_running=4, max_queue=4, max_n=4, max_logprobs=5, max_stop_strings=3)


@pytest.fixture
def callers():
    """Who may ask; everyone, unless a file of tests says otherwise."""
    return Callers()


@pytest.fixture
async def loading(settings, callers, tokenizer, tmp_path):
    """A server that listens and has no model yet."""
    state, metrics = ServerState(settings), Metrics()
    health = HealthServicer(service_names(settings.protocols))
    metrics.name_model("fake")
    service = InferenceServicer(state, metrics)
    parts = Parts(
        host="127.0.0.1",
        port=0,
        state=state,
        service=service,
        health=health,
        metrics=GrpcMetrics(metrics.registry),
        callers=callers,
        others=services(settings.protocols, service),
    )
    server = Listener(parts)
    await server.start()
    port = server.port
    engine = FakeEngine(settings, tmp_path)
    engine.start_now()
    async with aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        yield Running(state, engine, metrics, health, service, server, channel, stub, port)
    await server.stop(0)
    await engine.stop()


@pytest.fixture
async def running(loading, settings, tokenizer):
    """A server that is ready."""
    loading.engine.on_step = loading.metrics.step
    loading.metrics.identify(READY, version="0", weights="float32", max_batch_tokens=64)
    loading.state.set_ready(Served("fake", "nowhere", tokenizer, loading.engine, READY, GENERATION))
    loading.health.set_ready(True)
    yield loading
    assert len(loading.state.admission) == loading.state.admission.sequences == 0
    assert loading.engine.running == 0, "every sequence has ended or was aborted"


INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def slow_engines(monkeypatch, tmp_path):
    """Servers start engines that load until they are told to be ready."""
    from tests.api.life import with_slow_engines

    with_slow_engines(monkeypatch, tmp_path)
