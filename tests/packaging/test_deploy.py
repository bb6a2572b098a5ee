"""The files of ``deploy/`` fit together."""

import json
import re
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def read(name: str):
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_compose_file_mounts_existing_files():
    compose = read("compose.yaml")
    assert set(compose["services"]) == {"longspan", "prometheus", "grafana"}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (DEPLOY / compose["services"]["longspan"]["build"]["context"] / "Dockerfile").exists()


def test_the_server_may_take_its_time_to_end():
    # 28 s with its default settings: tests/api/test_app.py holds it to that.
    assert read("compose.yaml")["services"]["longspan"]["stop_grace_period"] == "30s"


def test_a_server_without_tls_says_so_and_is_published_on_this_machine_only():
    service = read("compose.yaml")["services"]["longspan"]
    assert "--insecure" in service["command"].split()
    assert service["ports"] == ["127.0.0.1:50051:50051"]


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus():
    (job,) = read("prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["longspan:9464"]}]
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    dashboard = json.loads((DEPLOY / "grafana/dashboards/longspan.json").read_text())
    uids = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert uids == {source["uid"]}
    (provider,) = read("grafana/provisioning/dashboards/longspan.yaml")["providers"]
    mounts = read("compose.yaml")["services"]["grafana"]["volumes"]
    assert any(mount == f"./grafana/dashboards:{provider['options']['path']}:ro" for mount in mounts)


def test_panels_have_room_and_names():
    dashboard = json.loads((DEPLOY / "grafana/dashboards/longspan.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(titles)


def test_alerts_have_a_remedy():
    (group,) = read("prometheus/alerts.yml")["groups"]
    for rule in group["rules"]:
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        for flag in re.findall(r"--[a-z-]+", rule["annotations"]["description"]):
            from server.settings import Settings

            assert flag[2:].replace("-", "_") in Settings.model_fields, flag
