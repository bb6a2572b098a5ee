"""What deploy/ gives to Kubernetes: the same from kustomize and Helm, valid by Kubernetes' own schemas."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from longspan.channel import DEFAULT_PORT, SERVICE
from server.cli.options import command

validate = pytest.importorskip("kubernetes_validate", reason="installed by make charts")
helm = pytest.importorskip("helm_python", reason="installed by make charts")

CHART, FOLDER, ENVOY = Path("deploy/helm"), Path("deploy/kubernetes"), Path("deploy/envoy/envoy.yaml")
NAMES = ("longspan", "longspan-envoy")
OF_OPERATORS = ("ServiceMonitor", "PodMonitor", "ScaledObject")


def by_name(documents: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Objects by kind and name, in the namespace longspan."""
    named = {(each["kind"], each["metadata"]["name"]): each for each in documents if each}
    assert len(named) == len([each for each in documents if each]), "two objects have one name"
    assert {each["metadata"]["namespace"] for each in named.values()} == {"longspan"}
    return named


def rendered(values: dict[str, Any] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """The chart's objects."""
    chart = helm.Chart.load(str(CHART))
    chart.validate_schema(values)
    manifests = chart.render(values, name="any", namespace="longspan")
    return by_name([each for text in manifests.values() for each in yaml.safe_load_all(text)])


def kustomized(folder: Path = FOLDER) -> dict[tuple[str, str], dict[str, Any]]:
    """What kubectl makes of the folder, its generated name without the hash."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which has kustomize built in, is not installed")
    run = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=True
    )
    documents = list(yaml.safe_load_all(run.stdout))
    generated = next(each["metadata"]["name"] for each in documents if each["kind"] == "ConfigMap")
    return by_name(list(yaml.safe_load_all(run.stdout.replace(generated, "longspan-envoy"))))


def test_kustomize_and_helm_give_the_same():
    chart, folder = rendered(), kustomized()
    del chart["Deployment", "longspan-envoy"]["spec"]["template"]["metadata"]["annotations"]
    assert chart.keys() == folder.keys()
    for name in chart:
        assert chart[name] == folder[name], name


@pytest.mark.parametrize("version", ["1.30", "1.34", "1.37"])
def test_objects_are_valid(version):
    objects = [each for name, each in rendered().items() if name[0] not in OF_OPERATORS]
    assert len(objects) == 10
    for each in objects:
        validate.validate(each, version, strict=True)
    wrong = dict(objects[0], spec=dict(objects[0].get("spec", {}), replicaz=1))
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, version, strict=True)


def test_values_are_heeded():
    objects = rendered(
        {
            "image": "registry.example/longspan:1",
            "arguments": ["--attention=sliding_window", "--attention-options={window: 4096}"],
            "autoscaler": {"enabled": False, "minReplicas": 5},
            "serviceMonitor": {"enabled": False},
            "networkPolicy": {"prometheus": []},
            "accessSecret": "mine",
            "cacheClaim": "models",
            "pod": {"imagePullSecrets": [{"name": "registry"}]},
            "envoy": {"pod": {"nodeSelector": {"edge": "true"}}},
        }
    )
    deployment = objects["Deployment", "longspan"]["spec"]
    pod = deployment["template"]["spec"]
    container = pod["containers"][0]
    assert deployment["replicas"] == 5
    assert container["image"] == "registry.example/longspan:1"
    assert container["args"][-2:] == ["--attention=sliding_window", "--attention-options={window: 4096}"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    envoy = objects["Deployment", "longspan-envoy"]["spec"]["template"]["spec"]
    assert envoy["nodeSelector"] == {"edge": "true"}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes["access"]["secret"]["secretName"] == "mine"
    assert volumes["cache"] == {"persistentVolumeClaim": {"claimName": "models"}}
    assert not {"HorizontalPodAutoscaler", "ServiceMonitor", "PodMonitor"} & {kind for kind, _ in objects}
    assert [len(objects["NetworkPolicy", name]["spec"]["ingress"]) for name in NAMES] == [1, 1]
    assert not {"NetworkPolicy"} & {kind for kind, _ in rendered({"networkPolicy": {"enabled": False}})}
    with pytest.raises(helm.HelmError):
        helm.Chart.load(str(CHART)).validate_schema({"imagee": "x"})
    with pytest.raises(helm.HelmError):
        helm.Chart.load(str(CHART)).validate_schema({"pod": {"containers": []}})


def test_keda_takes_the_place_of_the_autoscaler(tmp_path):
    shutil.copytree("deploy", tmp_path / "deploy", symlinks=True)
    own = tmp_path / "deploy" / "own"
    own.mkdir()
    lines = ("namespace: longspan", "resources: [../kubernetes]", "components: [../kubernetes/keda]")
    (own / "kustomization.yaml").write_text("\n".join(lines))
    kinds = {kind for kind, _ in kustomized(own)}
    assert "ScaledObject" in kinds
    assert "HorizontalPodAutoscaler" not in kinds


def test_what_is_named_exists():
    """Flags of the server, ports, the health service, metrics and selectors are those that there are."""
    import typer.main

    objects = rendered()
    deployment = objects["Deployment", "longspan"]["spec"]["template"]
    container = deployment["spec"]["containers"][0]
    serve = typer.main.get_command(command(lambda settings: 0))
    flags = {flag for parameter in serve.params for flag in parameter.opts}
    assert container["args"][0] == "serve"
    assert {argument.split("=")[0] for argument in container["args"][1:]} <= flags
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["grpc"] == DEFAULT_PORT
    *clusters, _ = yaml.safe_load(ENVOY.read_text())["static_resources"]["clusters"]
    for cluster in clusters:
        assert cluster["health_checks"][0]["grpc_health_check"]["service_name"] == SERVICE
        endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        address = endpoint["address"]["socket_address"]
        assert ("Service", address["address"]) in objects
        assert address["port_value"] == ports["grpc"]
    labels = deployment["metadata"]["labels"].items()
    assert objects["Service", "longspan-headless"]["spec"]["selector"].items() <= labels
    job = objects["ServiceMonitor", "longspan"]["spec"]["jobLabel"]
    name = objects["Service", "longspan-headless"]["metadata"]["labels"][job]
    assert f'job="{name}"' in Path("deploy/prometheus/alerts.yml").read_text()
    source = "".join(path.read_text() for path in Path("server/observe").glob("*.py"))
    for metric in objects["HorizontalPodAutoscaler", "longspan"]["spec"]["metrics"]:
        assert f'"{metric["pods"]["metric"]["name"].removeprefix("longspan_")}"' in source


def test_who_reaches_whom():
    """Policies select a deployment's pods each, and name their ports: grpc for calls, the other to scrape."""
    objects = rendered()
    pods = {name: objects["Deployment", name]["spec"]["template"] for name in NAMES}
    callers = {"longspan": pods["longspan-envoy"]["metadata"]["labels"], "longspan-envoy": None}
    for name, pod in pods.items():
        policy = objects["NetworkPolicy", name]["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        calls, scrapes = policy["ingress"]
        assert [rule["port"] for rule in calls["ports"]] == ["grpc"]
        peers = [peer["podSelector"]["matchLabels"] for peer in calls.get("from", ())]
        assert peers == ([] if callers[name] is None else [callers[name]]), "Envoy is called by all"
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert [rule["port"] for rule in scrapes["ports"]] == [port for port in ports if port != "grpc"]
        assert scrapes["from"], "not by all"
    monitored = objects["PodMonitor", "longspan-envoy"]["spec"]
    assert (
        monitored["selector"]["matchLabels"].items() <= pods["longspan-envoy"]["metadata"]["labels"].items()
    )
    (endpoint,) = monitored["podMetricsEndpoints"]
    listeners = yaml.safe_load(ENVOY.read_text())["static_resources"]["listeners"]
    (shown,) = (each for each in listeners if each["name"] == endpoint["port"])
    assert shown["address"]["socket_address"]["port_value"] == ports[endpoint["port"]]
