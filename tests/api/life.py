"""A server in this process, whose engine loads until it is told to be ready."""

import asyncio
import http.client

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import server.app as app
from longspan.v1 import inference_pb2, inference_pb2_grpc
from server.access.granted import granted
from server.api.health import READINESS
from server.engine.ipc.spare import Spare
from server.messages import Loading
from server.models.resolve import ModelFiles
from server.settings import Settings
from tests.api.conftest import ask, save_tokenizer, until
from tests.api.fake_engine import FakeEngine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class SlowEngine(FakeEngine):
    """Loads until it is told to be ready."""

    made: list["SlowEngine"] = []  # noqa: RUF012 (emptied by the fixture)

    async def start(self):
        self.made.append(self)
        self.progress = Loading("loading weights", 0.4)

    async def stop(self):
        if self.state == "loading":
            self.state = "stopped"
        else:
            await super().stop()


class Life:
    """A server that runs in a task, and a client of it."""

    def __init__(self, **settings):
        given = Settings(port=0, metrics_port=0, **settings)
        self.server = app.Server(given, granted(given))
        self.task = asyncio.create_task(self.server.run())

    async def __aenter__(self):
        await until(lambda: self.server.port != 0)
        self.channel = aio.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        if not self.task.done():
            self.server.end()
        await asyncio.gather(self.task, return_exceptions=True)

    async def health(self):
        answer = await health_pb2_grpc.HealthStub(self.channel).Check(
            health_pb2.HealthCheckRequest(service=READINESS)
        )
        return answer.status

    async def probe(self, path):
        """The status of a probe by HTTP, by a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.metrics_port, timeout=5)

        def get():
            connection.request("GET", path)
            return connection.getresponse().status

        try:
            return await asyncio.to_thread(get)
        finally:
            connection.close()

    async def engine(self, number=0):
        """The engine started as number ``number``, ready."""
        await until(lambda: len(SlowEngine.made) > number, seconds=60)
        engine = SlowEngine.made[number]
        engine.start_now()
        engine.step_seconds = 0.005
        await until(lambda: self.server.state.phase in ("ready", "draining"), seconds=60)
        return engine

    def endless(self):
        request = ask(stop={"max_tokens": 190, "ignore_eos": True})
        return aiter(self.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request)))


def with_slow_engines(monkeypatch, tmp_path):
    """Has servers start such engines, for a model in ``tmp_path``."""
    folder = save_tokenizer(tmp_path / "model")
    SlowEngine.made = []
    monkeypatch.setattr(Spare, "keep", lambda self: None)  # torch takes seconds, and no engine here needs it
    monkeypatch.setattr(app, "EngineClient", SlowEngine)
    monkeypatch.setattr(app, "resolve_model", lambda *_, **__: ModelFiles(folder, "fake", "nowhere", folder))
