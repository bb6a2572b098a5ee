"""Where events of the KV cache, which tell prompts, may be published."""

from __future__ import annotations

import pytest

from server.access.granted import granted
from server.errors import RefusedError
from server.settings import Settings


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5557", "tcp://[::1]:5557", "ipc:///run/events"])
def test_addresses_of_this_machine_are_taken(address):
    granted(Settings(kv_events=address, kv_events_replay=address))


@pytest.mark.parametrize("address", ["tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://[::]:5557"])
def test_others_only_where_the_network_protects_them(address):
    with pytest.raises(RefusedError, match="could read the tokens of all prompts"):
        granted(Settings(kv_events=address))
    granted(Settings(kv_events=address, insecure=True))


@pytest.mark.parametrize("address", ["5557", "tcp://127.0.0.1", "udp://127.0.0.1:1", "tcp://[::1:5"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(RefusedError, match="give tcp://HOST:PORT or ipc://PATH"):
        granted(Settings(kv_events=address))


def test_a_replay_without_events_is_refused():
    with pytest.raises(RefusedError, match="--kv-events-replay needs --kv-events"):
        granted(Settings(kv_events_replay="ipc:///run/replay"))


def test_grpc_alone_needs_the_protocol_that_streams_them():
    granted(Settings(kv_events="grpc", protocols="kserve,vllm"))
    with pytest.raises(RefusedError, match="--kv-events grpc needs --protocols vllm"):
        granted(Settings(kv_events="grpc", protocols="kserve"))
    with pytest.raises(RefusedError, match="--kv-events-replay needs an address in --kv-events"):
        granted(Settings(kv_events="grpc", kv_events_replay="ipc:///run/replay", protocols="vllm"))


def test_without_a_prefix_cache_there_are_none():
    with pytest.raises(RefusedError, match="--no-prefix-cache leaves it empty"):
        granted(Settings(kv_events="ipc:///run/events", prefix_cache=False))
