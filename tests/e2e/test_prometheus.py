"""A real Prometheus scrapes a real server under a real load; dashboard and alerts are run against it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from loadtest.load import driver, targets
from loadtest.load.measures import summarize
from loadtest.load.types import ClosedLoop
from loadtest.load.workloads import Shape, fixed
from tests.e2e.here import serving

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/longspan.json").read_text())
EXPRESSIONS = [
    (panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]
]

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed (Debian's package prometheus has both)",
)


class Prometheus:
    """A Prometheus of its own that scrapes one address twice a second."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = folder / "prometheus.yml"
        scraped = {"job_name": "longspan", "static_configs": [{"targets": [target]}]}
        # JSON is YAML.
        config.write_text(json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": [scraped]}))
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
                "--log.level=warn",
            ]
        )

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """An instant query: labels and value of each series."""
        url = f"http://{self.address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def value(self, expression: str) -> float:
        """Of an expression with one series."""
        ((_, value),) = self.query(expression)
        return value

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        """Until the expression gives something."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self.query(expression):
                    return
            except OSError:
                pass  # it does not listen yet
            assert time.monotonic() < end, f"{expression} gave nothing"
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(tiny_settings):
    with serving(**tiny_settings, max_context=512, measure_device=True) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    running = Prometheus(tmp_path_factory.mktemp("prometheus"), f"{server.host}:{server.metrics_port}")
    try:
        running.wait("up == 1")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def summary(server, prometheus):
    """Some seconds of load, and what its client counted."""
    with server.client() as client:
        vocabulary = client.model_info().vocabulary_size
    sessions = fixed(Shape(60, 20, 30, vocabulary, 512))
    began = time.monotonic()
    outcome = driver.run(targets.Server(server.host, server.port), sessions, ClosedLoop(4), workers=1)
    time.sleep(max(0.0, 4 - (time.monotonic() - began)))
    found = summarize(outcome.records)
    prometheus.wait(f"sum(longspan_requests_total) == {found.requests}")
    return found


def test_promtool_finds_nothing_wrong_with_the_metrics(server, summary):
    url = f"http://{server.host}:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_promql_gives_the_load_tests_own_counts(prometheus, summary):
    assert not summary.failed
    for name, count in (
        ("longspan_requests_total", 60),
        ("longspan_generation_tokens_total", summary.output_tokens),
        ("longspan_prompt_tokens_total", summary.prompt_tokens),
        ("longspan_time_to_first_token_seconds_count", 60),
        ("longspan_inter_token_latency_seconds_count", summary.output_tokens - 60),
        ("longspan_request_generation_tokens_sum", summary.output_tokens),
        ('longspan_grpc_server_handled_total{grpc_method="StreamGenerate",grpc_code="OK"}', 60),
    ):
        assert prometheus.value(f"sum({name})") == count, name
    mean = "sum(longspan_{0}_sum) / sum(longspan_{0}_count)"
    latency = prometheus.value(mean.format("e2e_request_latency_seconds"))
    assert 0 < latency <= summary.latency.mean
    phases = sum(
        prometheus.value(mean.format(f"request_{p}_time_seconds")) for p in ("queue", "prefill", "decode")
    )
    assert phases == pytest.approx(latency, rel=0.1)


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_panel_shows_something(prometheus, summary, title, expression):
    # Grafana's variables: the selected models, and a range of a few scrapes.
    expression = expression.replace("$model", ".*").replace("$__rate_interval", "30s")
    assert "$" not in expression
    series = prometheus.query(expression)
    assert series, f"{title} is empty"
    assert any(value == value for _, value in series), f"{title} has no numbers"


def test_the_alerts_fire_when_they_should_and_only_then():
    folder = DEPLOY / "prometheus"
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_that_an_alert_names_exists(prometheus, summary):
    rules = (DEPLOY / "prometheus/alerts.yml").read_text()
    url = f"http://{prometheus.address}/api/v1/metadata"
    with urllib.request.urlopen(url, timeout=10) as response:
        known = json.load(response)["data"]
    words = rules.replace("(", " ").replace("{", " ").replace("[", " ").split()
    for name in {word for word in words if word.startswith("longspan_")}:
        family = name.removesuffix("_bucket")
        assert family in known or family.removesuffix("_total") in known, name
