"""``longspan serve --ray``: a real Ray on this machine with replicas of a small model."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from longspan import (
    Client,
    DeadlineError,
    InvalidRequestError,
    LongspanError,
    NotFoundError,
    UnavailableError,
)
from server.ray import edge
from server.ray.loopback import exposed
from tests.e2e.server import Server
from tests.processes import wait_until

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed (longspan[ray])"
    ),
]

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
FURTHER = ("other", "third", "fourth")
LONG = {"temperature": 0, "max_tokens": 900, "ignore_eos": True}


def free_ports(count):
    """The first of so many ports in a row that are free."""
    while True:
        probes = [socket.socket() for _ in range(count)]
        try:
            probes[0].bind(("127.0.0.1", 0))
            first = probes[0].getsockname()[1]
            for index, probe in enumerate(probes[1:], start=1):
                probe.bind(("127.0.0.1", first + index))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first


class Served:
    """A ``longspan serve --ray``, ready."""

    def __init__(self, folder, *arguments):
        self.metrics_port = free_ports(4)
        self.folder = folder
        self.log = (folder / "log").open("w+")
        command = [sys.executable, "-m", "server.cli", "serve", "--ray", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--metrics-port", str(self.metrics_port), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "RAY_TMPDIR": str(folder)},
        )
        line = self.process.stdout.readline()
        match = re.match(r"Longspan is ready: \S+ on 127\.0\.0\.1:(\d+)", line)
        assert match, f"{line!r}; log:\n{(folder / 'log').read_text()[-4000:]}"
        self.port = int(match[1])

    def replicas(self):
        """Processes of the replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "ServeReplica:longspan:Longspan" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def samples(self, rank, name):
        """Those of a metric of the replica of a rank."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.metrics_port + rank}/metrics", timeout=10
        ) as page:
            families = text_string_to_metric_families(page.read().decode())
            return [sample for family in families for sample in family.samples if sample.name == name]

    def page(self, rank):
        """Requests that the replica of a rank has ended, by their codes."""
        counts = Counter()
        for sample in self.samples(rank, "longspan_requests_total"):
            counts[sample.labels["grpc_code"]] += sample.value
        return counts

    def running(self, rank):
        """Sequences that the replica of a rank works on."""
        return sum(sample.value for sample in self.samples(rank, "longspan_requests_running"))

    def requests(self, rank):
        """Requests that the replica of a rank has ended."""
        return sum(self.page(rank).values())

    def ended(self, code):
        """Requests that ended so, in the first two replicas."""
        pages = (self.page(rank) for rank in (0, 1))
        return sum(page.get(code, 0) for page in pages)

    def client(self, **options):
        return Client("127.0.0.1", self.port, **options)


@pytest.fixture(scope="module")
def served(tiny, tiny_packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("r")
    served = Served(
        folder,
        *tiny_packed,
        *("--ray-replicas", "2", "--ray-max-replicas", "3", "--ray-target-requests", "4"),
        *("--ray-scale-up-seconds", "0", "--drain-seconds", "5"),
        *(part for name in FURTHER for part in ("--ray-model", f"{name}={tiny}")),
    )
    yield served
    known = psutil.Process(served.process.pid).children(recursive=True)
    with served.client() as client:
        client.wait_until_ready(60)
        deltas = iter(client.stream("one", **LONG))
        begun = len(next(deltas).token_ids)
        served.process.terminate()
        wait_until(lambda: refused(served))
        assert begun + sum(len(delta.token_ids) for delta in deltas) == 900, "it drains"
    assert served.process.wait(60) == 0
    _, alive = psutil.wait_procs(known, 10)
    assert not alive, "Ray and engines end with the server"


def refused(served):
    """Whether a new call is; its status is one that clients repeat."""
    try:
        with served.client(retries=False) as client:
            client.generate("one", max_tokens=1)
    except UnavailableError as error:
        return error.reason == "NO_REPLICA"
    else:
        return False


@contextmanager
def streams(served, count, **options):
    """So many streams at once; how each ended, in the end."""
    ends = []

    def read(number):
        try:
            with served.client() as client:
                ends.append(sum(len(delta.token_ids) for delta in client.stream(f"{number} is", **options)))
        except LongspanError as error:
            ends.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    yield ends
    for thread in threads:
        thread.join(120)


def test_replicas_answer_as_one_server_does(served, tiny_packed):
    prompts = [f"the {number} of" for number in range(12)]
    alone = Server(*tiny_packed)
    try:
        with alone.client() as client:
            expected = [client.generate(prompt, **GREEDY).text for prompt in prompts]
    finally:
        alone.stop()
    with served.client() as client:
        assert [client.generate(prompt, **GREEDY).text for prompt in prompts] == expected
        streamed = ["".join(delta.text for delta in client.stream(prompt, **GREEDY)) for prompt in prompts]
        assert streamed == expected
        with pytest.raises(InvalidRequestError) as refused:
            client.generate("x", temperature=-1)
        assert refused.value.violations[0].field == "sampling.temperature"
    assert min(served.requests(0), served.requests(1)) > 0, "both have answered"


def test_only_this_machine_reaches_any_process_of_it(served):
    assert exposed("127.0.0.1", served.process.pid) == []


def test_no_program_without_its_token_has_a_replica_read_a_pickle(served):
    codes = set()
    for connection in served.replicas()[0].net_connections("inet"):
        if connection.status != psutil.CONN_LISTEN:
            continue
        with grpc.insecure_channel(f"127.0.0.1:{connection.laddr.port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10)
        codes.add(refused.value.code())
    # /metrics speaks HTTP/1.1; Ray's other servers know no such method.
    assert codes == {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAVAILABLE,
    }


def test_a_request_ends_by_its_name_in_whichever_replica_it_is(served):
    for number in range(4):
        with served.client() as client:
            stream = client.stream("one", request_id=f"mine-{number}", **LONG)
            deltas = iter(stream)
            next(deltas)
            assert client.abort(f"mine-{number}")
            stream.close()
            assert not client.abort("never there")


def test_a_client_that_leaves_or_is_late_ends_its_request(served):
    cancelled, late = served.ended("CANCELLED"), served.ended("DEADLINE_EXCEEDED")
    with served.client() as client:
        for _ in range(4):
            stream = client.stream("one", **LONG)
            deltas = iter(stream)
            next(deltas)
            stream.close()
        with pytest.raises(DeadlineError):
            client.generate("one", timeout=0.2, **LONG)
    wait_until(lambda: served.ended("CANCELLED") == cancelled + 4)
    wait_until(lambda: served.ended("DEADLINE_EXCEEDED") == late + 1)


def test_calls_name_a_further_model(served):
    with served.client(metadata=[("multiplexed_model_id", "other")]) as client:
        assert client.models() == ["other"]
        assert client.generate("one two", **GREEDY).text
    with served.client(metadata=[("multiplexed_model_id", "../etc")]) as client, pytest.raises(NotFoundError):
        client.generate("one")


def test_a_further_model_makes_room_for_the_next(served):
    """Of three models two replicas, which have one of them each, must end one."""

    def told():
        for name in FURTHER:
            with served.client(metadata=[("multiplexed_model_id", name)]) as client:
                assert client.models() == [name]
        return "has ended, to make room" in (served.folder / "log").read_text()

    wait_until(told)


def test_a_replica_that_is_killed_loses_its_own_streams_and_is_replaced(served):
    wait_until(lambda: len(served.replicas()) == 2, 60)
    with streams(served, 8, **LONG) as ends:
        wait_until(lambda: served.running(0) and served.running(1))
        killed = served.replicas()[0]
        engines = killed.children()
        killed.send_signal(signal.SIGKILL)
    lost = [end for end in ends if isinstance(end, UnavailableError)]
    assert 0 < len(lost) < 8
    assert {error.reason for error in lost} == {"REPLICA_LOST"}
    assert [end for end in ends if not isinstance(end, UnavailableError)] == [900] * (8 - len(lost))
    assert not psutil.wait_procs(engines, 10)[1]
    wait_until(lambda: len([each for each in served.replicas() if each.pid != killed.pid]) == 2, 60)
    with served.client() as client:
        client.wait_until_ready(60)
        assert client.generate("one", **GREEDY).text


def test_under_load_there_are_more_replicas(served):
    with served.client() as client:
        client.wait_until_ready(60)
    until = time.monotonic() + 120
    while len(served.replicas()) < 3:
        assert time.monotonic() < until
        with streams(served, 16, **LONG):
            pass


def test_a_serve_config_names_the_application():
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from longspan.ray import app
    from server.errors import RefusedError

    page = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "longspan.ray:app"
    assert config["grpc_options"]["grpc_servicer_functions"] == [edge.FUNCTION]
    assert app(application["args"])
    with pytest.raises(RefusedError, match="--tls-key does not go with --ray"):
        app({"tls_key": "key.pem"})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        app({"modle": "x"})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--model", "/not/there"], "there is no model '/not/there'"),
        (["--model-name", "a", "--ray-model", "a=b"], "--ray-model a: the first model has this name, too"),
    ],
)
def test_why_it_cannot_serve_is_told(given, sentence, tiny_packed, tmp_path_factory):
    ended = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "--ray", "--port", "0", *map(str, tiny_packed), *given],
        env={**os.environ, "RAY_TMPDIR": str(tmp_path_factory.mktemp("n"))},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"longspan: {sentence}")


def test_a_port_that_is_taken_is_refused_before_ray_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "server.cli", "serve", "--ray", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith(
        f"longspan: gRPC can't listen on 127.0.0.1:{port} (Address already in use)"
    )
