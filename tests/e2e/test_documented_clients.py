"""The examples of ``docs/clients.md``, as far as the test environment has their language."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from longspan.v1 import inference_pb2, types_pb2

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()


def test_the_python_example_runs_as_it_stands(server):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert program.count("50051") == 1
    program = program.replace("50051", str(server.port))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.stderr == ""
    assert "Tokyo" in done.stdout
    assert re.search(r"\n\d+ tokens\n$", done.stdout)


def test_the_grpcurl_example_is_a_request_that_reflection_describes(server):
    (body, service, method) = re.search(r"-d '(.*?)' \\\n.*? (\S+)/(\w+)\n", PAGE).groups()
    with grpc.insecure_channel(f"{server.host}:{server.port}") as channel:
        # No message of this repository's stubs: all is learned from the server, as grpcurl does.
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        described = pool.FindServiceByName(service).FindMethodByName(method)
        request, response = map(GetMessageClass, (described.input_type, described.output_type))
        stream = channel.unary_stream(
            f"/{service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        events = [
            json_format.MessageToDict(event)
            for event in stream(json_format.ParseDict(json.loads(body), request()), timeout=60)
        ]
    assert "accepted" in events[0]
    assert events[-1]["finished"]["usage"]["completionTokens"] == 20
    assert "".join(event["delta"].get("text", "") for event in events if "delta" in event)


def test_the_go_example_is_that_of_its_folder_and_uses_names_that_the_proto_has():
    program = (ROOT / "examples/go/chat.go").read_text()
    parts = re.findall(r"```go\n(.*?)```", PAGE, re.DOTALL)
    assert len(parts) == 2
    assert all(part in program for part in parts)
    names = re.findall(r"pb\.([A-Z]\w+)\{", program)
    assert names
    for name in names:
        message, _, field = name.partition("_")
        described = (getattr(inference_pb2, message, None) or getattr(types_pb2, message)).DESCRIPTOR
        assert not field or field.lower() in described.fields_by_name
