"""The rendered chart: valid by the published schemas in all combinations of values, with the launcher's numbers."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from chart import CHART, helm, render, template
from kubeconform import problems
from machine import ROOT

from vllm_launch.settings.flags import parse_flags
from vllm_launch.settings.read import read_settings
from vllm_launch.settings.settings import LauncherSettings

EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
HUB, FOLDER = {"config": {"model": "some/model"}}, {"config": {"model": "/models/a"}, "models": {"claim": "models"}}
SEVERAL = {"cache": {"kind": "ephemeral"}}

# Each entry changes the rendered manifests. Tests combine every two entries that do not exclude each other.
AXES = {
    "cpu": {"gpus": {"count": 0}},
    "eight": {"gpus": {"count": 8, "resource": "nvidia.com/gpu", "runtimeClass": "nvidia"}},
    "folder": FOLDER,
    "image": {"config": {"model": "/models/a"}, "models": {"image": "registry/models:1"}},
    "keda": {"autoscaling": {"by": "keda"}} | SEVERAL,
    "hpa": {"autoscaling": {"by": "hpa", "min": 2}} | SEVERAL,
    "replicas": {"replicas": 3, "rollout": {"spare": True}} | SEVERAL,
    "download": {"download": {"enabled": True}, "cache": {"accessMode": "ReadWriteMany", "storageClass": "nfs"}},
    "secrets": {"apiKeys": {"keys": ["a", "b"]}, "hfToken": {"token": "c"}},
    "existing": {"apiKeys": {"existingSecret": "a"}, "hfToken": {"existingSecret": "b"}, "serviceAccount": {"name": "c"}},
    "ingress": {"ingress": {"enabled": True, "host": "a.b", "className": "nginx", "tlsSecret": "t"}},
    "route": {"httpRoute": {"enabled": True, "parents": [{"name": "g"}]}, "inferencePool": {"enabled": True, "picker": "p"}},
    "monitoring": {"monitoring": {"podMonitor": True, "rules": True, "dashboards": True, "labels": {"release": "p"}}},
    "openshift": {"user": None, "networkPolicy": {"from": [{"podSelector": {}}], "egress": [{"to": [{"podSelector": {}}]}]}},
    "extras": {
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "podLabels": {"team": "a"},
        "podAnnotations": {"b": "c"},
        "volumes": [{"name": "v", "emptyDir": {}}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "image": {"digest": f"sha256:{'a' * 64}", "pullSecrets": ["p"]},
        "scheduling": {"priorityClass": "high", "nodeSelector": {"a": "b"}, "affinity": {"nodeAffinity": {}}, "spreadOver": ""},
    },
}  # fmt: skip


def merged(*parts):
    values = {}
    for part in parts:
        for key, value in part.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return values


EXCLUSIVE = [
    {"cpu", "eight"},
    {"folder", "image"},  # /models is one folder
    {"secrets", "existing"},
    *({"download", other} for other in ("folder", "image", "keda", "hpa", "replicas")),  # one hub download for all pods
]
PAIRS = [pair for pair in itertools.combinations(AXES, 2) if {*pair} not in EXCLUSIVE]


def test_there_are_at_least_thirty_combinations():
    assert len(PAIRS) >= 30


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_combination_is_valid_by_the_schemas(pair):
    assert problems(template(merged(HUB, *(AXES[name] for name in pair))).stdout) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(example):
    values = yaml.safe_load(example.read_text())
    assert problems(template(values).stdout) == []
    helm("lint", "--strict", CHART, "-f", example)


def test_helm_lint_passes():
    helm("lint", "--strict", CHART)


@pytest.fixture
def pod():
    """Returns a function that renders values and returns the pod's spec and its container."""

    def pod_with(**values):
        spec = render(values)["Deployment", "llama3"]["spec"]["template"]["spec"]
        return spec, spec["containers"][0]

    return pod_with


def test_defaults_equal_the_launchers(pod):
    spec, container = pod()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    settings = read_settings(parse_flags(["some/model"]), {})
    assert ports == {"api": settings.port, "health": LauncherSettings().health_port}
    pre_stop_seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] == LauncherSettings().drain_seconds + pre_stop_seconds


@pytest.mark.parametrize("dash", ["-", "_"])
def test_times_and_ports_come_from_the_config_file_in_either_spelling(pod, dash):
    launch = {f"drain{dash}seconds": 300, f"health{dash}port": 9001}
    spec, container = pod(config={"model": "a/b", "port": 9000, "launch": launch})
    assert spec["terminationGracePeriodSeconds"] == 305
    assert [port["containerPort"] for port in container["ports"]] == [9000, 9001]


def test_a_drain_of_zero_seconds_is_not_replaced_by_the_default(pod):
    spec, _ = pod(config={"model": "a/b", "launch": {"drain_seconds": 0}})
    assert spec["terminationGracePeriodSeconds"] == 5


def test_probes_use_the_health_port_and_start_up_has_its_full_time():
    deployment = render({"rollout": {"startMinutes": 30}})["Deployment", "llama3"]["spec"]
    container = deployment["template"]["spec"]["containers"][0]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"] for name, probe in probes.items()}
    assert paths == {
        "startup": {"path": "/startupz", "port": "health"},
        "readiness": {"path": "/readyz", "port": "health"},
        "liveness": {"path": "/livez", "port": "health"},
    }
    budget = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
    assert budget == 30 * 60
    assert (
        deployment["progressDeadlineSeconds"] > budget + deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    )


@pytest.mark.parametrize(
    ("gpus", "shm", "limit"), [(0, "1Gi", "33792Mi"), (1, "1Gi", "33792Mi"), (4, "4Gi", "36864Mi")]
)
def test_shared_memory_grows_with_the_gpus_and_counts_in_the_limit(pod, gpus, shm, limit):
    spec, container = pod(gpus={"count": gpus})
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": shm}
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] == limit
    assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus


def test_a_mig_slice_is_requested_by_its_resource_name(pod):
    _, container = pod(gpus={"resource": "nvidia.com/mig-3g.40gb"})
    assert container["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 1
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_without_gpus_the_image_is_the_cpu_one(pod):
    assert pod(gpus={"count": 0})[1]["image"].endswith("-cpu")
    assert not pod()[1]["image"].endswith("-cpu")
    assert pod(image={"digest": f"sha256:{'a' * 64}"})[1]["image"] == f"vllm-launch@sha256:{'a' * 64}"


def test_chart_and_package_versions_agree():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert version == f'version = "{chart["version"]}"' == f'version = "{chart["appVersion"]}"'


def test_the_config_map_has_the_config_file_and_a_name_by_its_content(tmp_path):
    config = {"model": "a/b", "kv-cache-memory-bytes": 4294967296, "launch": {"drain_seconds": 60}}
    names = []
    for changed in (config, config | {"max-model-len": "8k"}):
        manifests = render({"config": changed})
        ((_, name),) = [key for key in manifests if key[0] == "ConfigMap"]
        text = manifests["ConfigMap", name]["data"]["config.yaml"]
        (tmp_path / "config.yaml").write_text(text)
        assert yaml.safe_load(text) == changed
        assert read_settings(parse_flags(["--config", str(tmp_path / "config.yaml")]), {}).launch.drain_seconds == 60
        volumes = manifests["Deployment", "llama3"]["spec"]["template"]["spec"]["volumes"]
        assert {"name": "config", "configMap": {"name": name}} in volumes
        names.append(name)
    assert len(set(names)) == 2


def test_every_pod_is_restricted_and_has_no_service_account_token():
    manifests = render(merged(HUB, AXES["download"], AXES["secrets"]))
    specs = [manifest["spec"] if kind == "Pod" else manifest["spec"]["template"]["spec"]
             for (kind, _), manifest in manifests.items() if kind in {"Pod", "Deployment", "Job"}]  # fmt: skip
    assert len(specs) == 3
    for spec in specs:
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_openshift_chooses_the_user():
    security = render({"user": None})["Deployment", "llama3"]["spec"]["template"]["spec"]["securityContext"]
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(security)


def test_secret_values_are_only_in_secrets():
    values = {"apiKeys": {"keys": ["key-of-a-client"]}, "hfToken": {"token": "token-of-the-hub"}}
    for (kind, _), manifest in render(values).items():
        text = yaml.safe_dump(manifest)
        assert kind == "Secret" or not ("key-of-a-client" in text or "token-of-the-hub" in text)


@pytest.mark.parametrize(
    ("spare", "strategy"), [(False, {"maxSurge": 0, "maxUnavailable": 1}), (True, {"maxSurge": 1, "maxUnavailable": 0})]
)
def test_a_rollout_uses_a_spare_gpu_only_if_there_is_one(spare, strategy):
    values = {"rollout": {"spare": spare}, "cache": {"kind": "emptyDir"}}
    assert render(values)["Deployment", "llama3"]["spec"]["strategy"]["rollingUpdate"] == strategy


def test_at_once_limits_rollouts_and_disruptions():
    manifests = render({"rollout": {"atOnce": "10%"}, "replicas": 20} | SEVERAL)
    assert manifests["Deployment", "llama3"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    assert manifests["PodDisruptionBudget", "llama3"]["spec"]["maxUnavailable"] == "10%"


def test_env_variables_are_set_in_the_download_too():
    manifests = render(merged(HUB, AXES["download"], {"env": [{"name": "HF_ENDPOINT", "value": "https://hub"}]}))
    (job,) = [manifest for (kind, _), manifest in manifests.items() if kind == "Job"]
    pod = manifests["Deployment", "llama3"]["spec"]["template"]["spec"]
    for container in (*job["spec"]["template"]["spec"]["containers"], *pod["containers"]):
        assert {"name": "HF_ENDPOINT", "value": "https://hub"} in container["env"]


def test_with_an_autoscaler_the_deployment_sets_no_replicas():
    for by, kind in (("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")):
        manifests = render({"autoscaling": {"by": by}} | SEVERAL)
        assert "replicas" not in manifests["Deployment", "llama3"]["spec"]
        assert manifests[kind, "llama3"]["spec"]["scaleTargetRef"]["name"] == "llama3"
    assert render({"replicas": 0})["Deployment", "llama3"]["spec"]["replicas"] == 0


@pytest.mark.parametrize(
    ("values", "has_budget"),
    [
        ({}, False),
        ({"replicas": 2}, True),
        ({"autoscaling": {"by": "hpa", "min": 1}}, False),
        ({"autoscaling": {"by": "hpa", "min": 2}}, True),
        ({"replicas": 2, "disruption": {"budget": False}}, False),
    ],
)
def test_a_single_replica_has_no_disruption_budget(values, has_budget):
    assert (("PodDisruptionBudget", "llama3") in render(values | SEVERAL)) is has_budget


def test_ingress_and_route_allow_long_streams():
    values = merged({"streamMinutes": 90}, AXES["ingress"], AXES["route"])
    manifests = render(values)
    annotations = manifests["Ingress", "llama3"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "5400"
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    (rule,) = manifests["HTTPRoute", "llama3"]["spec"]["rules"]
    assert rule["timeouts"] == {"request": "90m", "backendRequest": "90m"}


def test_egress_to_the_hub_is_allowed_only_for_models_from_the_hub():
    def ports(values):
        rules = render(values)["NetworkPolicy", "llama3"]["spec"]["egress"]
        return {port["port"] for rule in rules for port in rule["ports"]}

    assert ports(HUB) == {53, 443}
    assert ports(FOLDER) == {53}


def test_helm_test_may_reach_a_restricted_api():
    policy = render({"networkPolicy": {"from": [{"podSelector": {"matchLabels": {"a": "b"}}}]}})[
        "NetworkPolicy", "llama3"
    ]
    api, health = policy["spec"]["ingress"]
    smoke = render()["Pod", "llama3-smoke"]["metadata"]["labels"]
    assert api["ports"] == [{"port": "api"}]
    assert any(peer["podSelector"]["matchLabels"].items() <= smoke.items() for peer in api["from"])
    assert "from" not in health
    (selected,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert smoke["app.kubernetes.io/component"] not in selected["values"]


def test_the_chart_ships_rules_and_dashboards_unchanged(tmp_path):
    """Text in {{ }} that Helm could read as a template is copied unchanged too."""
    chart = tmp_path / "helm"
    shutil.copytree(CHART, chart, symlinks=True)
    shutil.copytree(ROOT / "monitoring", tmp_path / "monitoring")
    rule = {
        "groups": [
            {"name": "a", "rules": [{"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }}"}}]}
        ]
    }
    (tmp_path / "monitoring/prometheus/rules/own.yaml").write_text(yaml.safe_dump(rule))
    (tmp_path / "monitoring/grafana/dashboards/own.json").write_text('{"title": "{{pod}}"}')
    helm("package", chart, "-d", tmp_path)
    (package,) = tmp_path.glob("*.tgz")
    manifests = render(AXES["monitoring"], chart=package)
    assert manifests["PrometheusRule", "llama3-own"]["spec"] == rule
    dashboard = manifests["ConfigMap", "llama3-own"]
    assert dashboard["data"]["own.json"].strip() == '{"title": "{{pod}}"}'
    assert dashboard["metadata"]["labels"].items() >= {"grafana_dashboard": "1", "release": "p"}.items()
    rules = yaml.safe_load((ROOT / "monitoring/prometheus/rules/vllm.yaml").read_text())
    assert manifests["PrometheusRule", "llama3-vllm"]["spec"] == rules
    boards = list((ROOT / "monitoring/grafana/dashboards").glob("*.json"))
    assert len(boards) == 5
    for board in boards:
        (text,) = manifests["ConfigMap", f"llama3-{board.stem}"]["data"].values()
        assert json.loads(text) == json.loads(board.read_text())
        assert len(text) < 1 << 20  # upper limit of a ConfigMap


def test_generated_files_are_up_to_date(tmp_path):
    runpy.run_path(str(ROOT / "scripts/generators/chart.py"))["main"](tmp_path)
    for name in ("values.schema.json", "README.md"):
        assert (tmp_path / name).read_text() == (CHART / name).read_text(), f"{name}: make generate"


def test_every_value_has_a_comment_on_its_line():
    text = (CHART / "values.yaml").read_text()
    assert len(text.splitlines()) <= 300
    rows = list(runpy.run_path(str(ROOT / "scripts/generators/chart.py"))["rows"](text))
    values = yaml.safe_load(text)
    for _, path, comment in rows:
        value = values
        for key in path:
            value = value[key]
        assert comment or (isinstance(value, dict) and value), ".".join(path)


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example.stem in {"cpu", "box"}], ids=lambda path: path.stem
)
def test_renders_equal_the_reviewed_golden_files(example):
    """To accept a new render: delete the golden file, run this test twice, and review the new file."""
    values = yaml.safe_load(example.read_text())
    # Rules and dashboards are copies of files in monitoring/. Their thousands of lines need no review here.
    values["monitoring"] = values.get("monitoring", {}) | {"rules": False, "dashboards": False}
    rendered = template(values).stdout
    golden = GOLDEN / f"{example.stem}.yaml"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(rendered)
        pytest.fail(f"{golden.name} did not exist. This test has written it: review it and run the test again")
    assert rendered == golden.read_text()
