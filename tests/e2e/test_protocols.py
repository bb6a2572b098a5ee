"""Services of other protocols on a server that wants TLS and tokens, whose rules hold for them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf.message_factory import GetMessageClass
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.authority import Authority
from tests.e2e.here import serving
from tests.e2e.test_access import Secured, make_token

SERVICES = [
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"],
    service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    channelz_pb2.DESCRIPTOR.services_by_name["Channelz"],
]


@pytest.fixture(scope="module")
def secured(tiny_settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("protocols")
    authority, identities = Authority(folder / "authority"), folder / "identities.toml"
    issued = authority.issue("localhost")
    tokens = {"alice": make_token("alice", identities)}
    with identities.open("a") as file:
        file.write("kv_tokens = 50\n")
    settings = {"tls_certificate": issued.certificate, "tls_key": issued.key, "identities": identities}
    others = {"protocols": "vllm,kserve,channelz", "kv_events": "grpc"}
    with serving(**tiny_settings, **settings, **others) as server:
        yield Secured(server, authority.root, identities, tokens)


@pytest.fixture
def channel(secured):
    credentials = grpc.ssl_channel_credentials(secured.root.read_bytes())
    with grpc.secure_channel(f"localhost:{secured.server.port}", credentials) as channel:
        yield channel


def metadata(secured):
    return [("authorization", f"Bearer {secured.tokens['alice']}")]


def test_no_method_of_any_answers_without_a_token(channel):
    methods = [method for service in SERVICES for method in service.methods]
    assert len(methods) > 30
    for method in methods:
        request = GetMessageClass(method.input_type)().SerializeToString()
        path = f"/{method.containing_service.full_name}/{method.name}"
        # Of whatever kind: it is refused before its message is received.
        answer = channel.stream_stream(path)(iter([request]), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(answer)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, path


def prompt(text: str, tokens: int) -> list[triton.InferInput]:
    values = {"text_input": text, "sampling_parameters": f'{{"max_tokens": {tokens}, "temperature": 0}}'}
    inputs = []
    for name, value in values.items():
        inputs.append(triton.InferInput(name, [1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([value.encode()], dtype=object))
    return inputs


def test_the_limits_of_an_identity_hold_for_the_open_inference_protocol(secured):
    headers = dict(metadata(secured))
    address = f"localhost:{secured.server.port}"
    with triton.InferenceServerClient(address, ssl=True, root_certificates=str(secured.root)) as client:
        with pytest.raises(InferenceServerException, match="shows no token"):
            client.infer(secured.server.name, prompt("Once upon a time", 8))
        result = client.infer(secured.server.name, prompt("Once upon a time", 8), headers=headers)
        with secured.client(secured.tokens["alice"]) as own:
            text = own.generate("Once upon a time", max_tokens=8, temperature=0).text
        assert result.as_numpy("text_output")[0].decode() == text
        with pytest.raises(InferenceServerException, match="requests of this identity claim 50 at most"):
            client.infer(secured.server.name, prompt("Once upon a time", 50), headers=headers)


def test_and_for_the_engine_protocol(secured, channel):
    stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
    sampling = {"max_tokens": 50, "ignore_eos": True}
    request = vllm_engine_pb2.GenerateRequest(text="Once upon a time", sampling_params=sampling)
    with pytest.raises(grpc.RpcError, match="requests of this identity claim 50 at most"):
        next(stub.Generate(request, metadata=metadata(secured), timeout=20))
    request.sampling_params.max_tokens = 8
    (answer,) = stub.Generate(request, metadata=metadata(secured), timeout=20)
    assert answer.complete.completion_tokens == 8


def test_events_that_tell_all_prompts_are_for_identities_that_may_read_them(secured, channel):
    stub, asked = vllm_engine_pb2_grpc.VllmEngineStub(channel), common_pb2.SubscribeKvEventsRequest()
    with pytest.raises(grpc.RpcError, match="kv_events = true") as caught:
        next(stub.SubscribeKvEvents(asked, metadata=metadata(secured), timeout=20))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    token = make_token("router", secured.identities)
    with secured.identities.open("a") as file:
        file.write("kv_events = true\n")
    end = time.monotonic() + 10
    while True:
        try:
            first = next(
                stub.SubscribeKvEvents(asked, metadata=[("authorization", f"Bearer {token}")], timeout=20)
            )
            break
        except grpc.RpcError:
            assert time.monotonic() < end, "the file is read again within a second"
            time.sleep(0.1)
    assert first.snapshot.count == 1


def test_channelz(secured, channel):
    stub = channelz_pb2_grpc.ChannelzStub(channel)
    servers = stub.GetServers(channelz_pb2.GetServersRequest(), metadata=metadata(secured), timeout=20).server
    assert sum(server.data.calls_started for server in servers) > 0
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetServer(channelz_pb2.GetServerRequest(server_id=10**9), metadata=metadata(secured), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_all_of_it_is_counted_by_method(secured):
    samples = secured.server.metrics()
    for code, service, method, kind in (
        ("OK", "inference.GRPCInferenceService", "ModelInfer", "unary"),
        ("OK", "vllm.grpc.engine.VllmEngine", "Generate", "server_stream"),
        ("NOT_FOUND", "grpc.channelz.v1.Channelz", "GetServer", "unary"),
    ):
        labels = f'grpc_code="{code}",grpc_method="{method}",grpc_service="{service}",grpc_type="{kind}"'
        assert samples[f"longspan_grpc_server_handled_total{{{labels}}}"] == 1
