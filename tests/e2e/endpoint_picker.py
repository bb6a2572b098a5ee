"""A picker of endpoints, as the Gateway API's inference extension has one: Envoy asks it by ext_proc.

A program of its own, in an environment of its own, since xds-protos overwrites files of other packages:
``endpoint_picker.py ADDRESS=METRICS_URL...`` prints its port.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

HEADER = "x-gateway-destination-endpoint"
WAITING, RUNNING = "longspan_requests_waiting", "longspan_requests_running"


def load(url: str) -> float:
    """Requests that wait or run, as a server's metrics say."""
    with urllib.request.urlopen(url, timeout=5) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((WAITING, RUNNING)))


def answers(endpoints: dict[str, str]):
    """What Envoy is told: the endpoint with the least load, in a header."""

    def process(requests: Iterator[ext_proc.ProcessingRequest], _context: grpc.ServicerContext):
        for request in requests:
            assert request.HasField("request_headers"), "Envoy was told to send these only"
            best = min(endpoints, key=lambda address: load(endpoints[address]))
            header = base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=HEADER, raw_value=best.encode()),
                append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            mutation = ext_proc.HeaderMutation(set_headers=[header])
            common = ext_proc.CommonResponse(header_mutation=mutation)
            yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse(response=common))

    return process


def main() -> None:
    """Serves until its standard input ends."""
    endpoints = dict(argument.split("=", 1) for argument in sys.argv[1:])
    server = grpc.server(ThreadPoolExecutor(8))
    method = grpc.stream_stream_rpc_method_handler(
        answers(endpoints),
        request_deserializer=ext_proc.ProcessingRequest.FromString,
        response_serializer=ext_proc.ProcessingResponse.SerializeToString,
    )
    service = "envoy.service.ext_proc.v3.ExternalProcessor"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Process": method}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0)


if __name__ == "__main__":
    main()
