"""Starts the real Envoy with the configuration that is shipped, before servers that run here, by TLS."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from longspan import AsyncClient, Client, ConnectOptions
from tests.authority import Authority
from tests.command import longspan
from tests.e2e.server import Running

SHIPPED = Path("deploy/envoy")


def binary() -> str | None:
    """Envoy's program: this environment's, or the path's."""
    return shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")


class Access(NamedTuple):
    """What servers and clients need to trust one another.

    Attributes:
        folder: with what the Secret of deploy/kubernetes has: tls.crt, tls.key, ca.crt and identities.toml.
        token: of an identity.
    """

    folder: Path
    token: str

    @property
    def serve(self) -> tuple[str | Path, ...]:
        """Options of a server."""
        return (
            *("--tls-certificate", self.folder / "tls.crt", "--tls-key", self.folder / "tls.key"),
            *("--identities", self.folder / "identities.toml"),
        )

    @property
    def settings(self) -> dict[str, Path]:
        """The same, of a server in this process."""
        names = {"tls_certificate": "tls.crt", "tls_key": "tls.key", "identities": "identities.toml"}
        return {setting: self.folder / name for setting, name in names.items()}

    @property
    def connect(self) -> ConnectOptions:
        """Options of a client."""
        return {"ca": self.folder / "ca.crt", "token": self.token}


def make_access(folder: Path) -> Access:
    """Makes the files, as docs/replicas.md says."""
    authority = Authority(folder / "authority")
    issued = authority.issue("longspan", "DNS:longspan,IP:127.0.0.1")
    shutil.copy(issued.certificate, folder / "tls.crt")
    shutil.copy(issued.key, folder / "tls.key")
    shutil.copy(authority.root, folder / "ca.crt")
    made = longspan("token", "tester", "--identities", str(folder / "identities.toml"))
    assert made.returncode == 0, made.stderr
    return Access(folder, made.stdout.strip())


def configuration(servers: Sequence[Running], access: Access, folder: Path) -> dict[str, Any]:
    """What is shipped, with these servers on free ports of loopback; its secrets in a folder."""

    def text(name: str) -> str:
        shipped = (SHIPPED / name).read_text()
        return shipped.replace("/access", str(access.folder)).replace("/etc/envoy", str(folder))

    for name in ("certificate.yaml", "roots.yaml"):
        (folder / name).write_text(text(name))
    config: dict[str, Any] = yaml.safe_load(text("envoy.yaml"))
    config["admin"]["address"]["socket_address"]["port_value"] = administration = _free_port()
    for listener in config["static_resources"]["listeners"]:
        listener["address"]["socket_address"].update(address="127.0.0.1", port_value=0)
    addresses = [
        {"socket_address": {"address": server.host, "port_value": server.port}} for server in servers
    ]
    *of_servers, admin = config["static_resources"]["clusters"]
    (itself,) = admin["load_assignment"]["endpoints"][0]["lb_endpoints"]
    itself["endpoint"]["address"]["socket_address"]["port_value"] = administration
    for cluster in of_servers:
        cluster["type"] = "STATIC"
        del cluster["dns_refresh_rate"], cluster["respect_dns_ttl"]
        cluster["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [{"endpoint": {"address": address}} for address in addresses]}
        ]
    return config


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Envoy:
    """A running Envoy. ``change`` may alter its configuration."""

    def __init__(
        self,
        servers: Sequence[Running],
        access: Access,
        change: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        config = configuration(servers, access, folder)
        self._options = access.connect
        if change:
            change(config)
        (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
        self._log = (folder / "log").open("w")
        program = binary()
        assert program
        self.process = subprocess.Popen(
            [
                *(program, "--config-path", folder / "envoy.yaml", "--admin-address-path", folder / "admin"),
                *("--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"),
                *("--drain-time-s", "1", "--parent-shutdown-time-s", "2"),
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._admin = self._wait(lambda: (folder / "admin").read_text().strip())
        listeners = json.loads(self._wait(lambda: self.ask("/listeners?format=json")))["listener_statuses"]
        ports = {each["name"]: each["local_address"]["socket_address"]["port_value"] for each in listeners}
        self.host, self.port, self._status = "127.0.0.1", ports["longspan"], ports["status"]
        self._wait(lambda: self.healthy("longspan") == len(servers) or None)
        self._wait(lambda: self.healthy("longspan_affinity") == len(servers) or None)

    def client(self, **options: Any) -> Client:
        """A new synchronous client of what is behind."""
        return Client(self.host, self.port, **{**self._options, **options})

    def aclient(self, **options: Any) -> AsyncClient:
        """A new asyncio client of what is behind."""
        return AsyncClient(self.host, self.port, **{**self._options, **options})

    def ready(self) -> bool:
        """Whether the kubelet's probe finds it so."""
        return self.status("GET", "/ready")[0] == 200

    def status(self, method: str, path: str) -> tuple[int, str]:
        """What the port for probes and Prometheus answers: a status and a text."""
        connection = http.client.HTTPConnection(self.host, self._status, timeout=5)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def begin_to_end(self) -> subprocess.Popen[bytes]:
        """Starts what the kubelet runs before SIGTERM."""
        pod = yaml.safe_load((SHIPPED / "deployment.yaml").read_text())["spec"]["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert "/127.0.0.1/9901" in command[-1]
        script = command[-1].replace("/127.0.0.1/9901", "/" + self._admin.replace(":", "/"))
        return subprocess.Popen([*command[:-1], script], start_new_session=True)

    def ask(self, path: str) -> str:
        """An answer of its administration."""
        with urllib.request.urlopen(f"http://{self._admin}{path}", timeout=5) as response:
            text: str = response.read().decode()
        return text

    def stats(self, start: str) -> dict[str, int]:
        """Its counters and gauges whose names begin so."""
        lines = self.ask(f"/stats?usedonly&filter=^{start}").splitlines()
        pairs = (line.split(": ") for line in lines)
        return {name: int(value) for name, value in pairs if value.isdigit()}

    def healthy(self, cluster: str) -> int:
        """To how many servers of a cluster it sends calls."""
        return self.stats(rf"cluster\.{cluster}\.membership_healthy$").get(
            f"cluster.{cluster}.membership_healthy", 0
        )

    def requests(self, cluster: str = "longspan") -> dict[int, int]:
        """How many calls each server has got, by its port."""
        statuses = json.loads(self.ask("/clusters?format=json"))["cluster_statuses"]
        hosts = next(status["host_statuses"] for status in statuses if status["name"] == cluster)
        return {
            host["address"]["socket_address"]["port_value"]: next(
                (int(stat.get("value", 0)) for stat in host["stats"] if stat["name"] == "rq_total"), 0
            )
            for host in hosts
        }

    def _wait(self, look: Callable[[], Any], seconds: float = 20.0) -> Any:
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, f"Envoy has ended:\n{Path(self._log.name).read_text()}"
            try:
                if found := look():
                    return found
            except OSError:
                pass
            assert time.monotonic() < end, f"Envoy is not ready:\n{Path(self._log.name).read_text()}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
