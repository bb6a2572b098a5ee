"""Starts the real server in its real processes, on free ports, and ends it again."""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from longspan import AsyncClient, Client

READY = re.compile(r"Longspan is ready: (\S+) on (\S+):(\d+)\n.*metrics http://\S+:(\d+)/metrics")


class Running:
    """How to reach a server that runs.

    Attributes:
        name: of its model.
        host: where it listens.
        port: of gRPC.
        metrics_port: of its metrics.
    """

    name = host = ""
    port = metrics_port = 0

    def read_ready(self, lines: str) -> bool:
        """Takes the attributes from the first two ready lines; ``False`` if these are others."""
        match = READY.search(lines)
        if match is not None:
            self.name, self.host = match[1], match[2]
            self.port, self.metrics_port = int(match[3]), int(match[4])
        return match is not None

    def client(self) -> Client:
        """A new synchronous client."""
        return Client(self.host, self.port)

    def aclient(self) -> AsyncClient:
        """A new asyncio client."""
        return AsyncClient(self.host, self.port)

    @property
    def address(self) -> str:
        """Where gRPC answers."""
        return f"{self.host}:{self.port}"

    def scrape(self) -> str:
        """Its metrics as text."""
        with urllib.request.urlopen(
            f"http://{self.host}:{self.metrics_port}/metrics", timeout=60
        ) as response:
            text: str = response.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        """A scrape: every sample by its name, labels but ``model_name`` included."""
        samples = {}
        for family in text_string_to_metric_families(self.scrape()):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items() if k != "model_name")
                samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return samples

    def restarts(self, cause: str) -> float:
        """How often another engine was started, for this cause."""
        return self.metrics().get(f'longspan_engine_restarts_total{{reason="{cause}"}}', 0)

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Waits until no sequence holds a page, and fails if that does not come."""
        end = time.monotonic() + seconds
        with self.client() as client:
            while True:
                load = client.server_info().load
                if load.pages_used == load.running == load.waiting == 0:
                    return
                assert time.monotonic() < end, f"pages or sequences are left over: {load}"
                time.sleep(0.02)


class Server(Running):
    """A ``longspan serve`` of its own, which may open so many ``files``."""

    def __init__(
        self,
        *arguments: str | Path,
        wait: bool = True,
        env: dict[str, str] | None = None,
        files: int | None = None,
    ) -> None:
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115 (lives as long as the server)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "server.cli", "serve", "--port", "0", "--metrics-port", "0"),
                # A test process that is killed leaves no server: its end of the pipe closes.
                *("--check-integrity", "--end-with-stdin"),
                *map(str, arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(env or {})},
            preexec_fn=None
            if files is None
            else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Reads the first two ready lines."""
        assert self.process.stdout is not None
        lines = self.process.stdout.readline() + self.process.stdout.readline()
        assert self.read_ready(lines), f"no ready lines but {lines!r}; log:\n{self.log}"

    def is_ready(self, seconds: float) -> bool:
        """Waits until it is ready, or has ended; fails where neither comes."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while not select.select([self.process.stdout], [], [], 0.05)[0]:  # its end is something to read, too
            assert time.monotonic() < end, f"neither ready nor ended; log:\n{self.log}"
        if self.process.stdout.buffer.peek(1):
            self.wait_ready()
            return True
        self.process.wait(seconds)
        return False

    @property
    def log(self) -> str:
        """Its standard error so far."""
        return Path(self._log.name).read_text()

    @property
    def engine_pid(self) -> int:
        """Process id of the engine that serves."""
        return self.engine_pids[0]

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of the engine that serves, and of the one that is kept to take its place, if any."""
        every = psutil.Process(self.process.pid).children()
        children = [child for child in every if child.status() != psutil.STATUS_ZOMBIE]
        engines = [child for child in children if "server.engine.ipc.process" in child.cmdline()]
        return [engine.pid for engine in sorted(engines, key=lambda engine: engine.create_time())]

    def probe(self, path: str) -> int:
        """The status of a probe of its health by HTTP, by a new connection."""
        connection = http.client.HTTPConnection(self.host, self.metrics_port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    async def cancel_many(self, count: int, rng: random.Random, workers: int = 40) -> None:
        """Begins ``count`` streams, ``workers`` at a time, and leaves each after some tokens."""
        left = iter(range(count))
        async with self.aclient() as client:

            async def worker() -> None:
                for _ in left:
                    leave_after, seen = rng.randint(0, 20), 0
                    async with client.stream("hello", max_tokens=400, ignore_eos=True) as stream:
                        async for delta in stream:
                            seen += len(delta.token_ids)
                            if seen >= leave_after:
                                break

            await asyncio.gather(*(worker() for _ in range(workers)))

    def stop(self, signal_number: int = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Ends the server and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
            raise
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()
            assert self.process.stdin is not None
            self.process.stdin.close()
            self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
