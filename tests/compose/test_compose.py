"""Tests of the Compose stack on a real Docker, from start to removal. Grafana does not run: its image is not available."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from machine import ROOT, free_port, generate_tiny_model, let_anybody_read

HERE = Path(__file__).parent
IMAGE = "vllm-launch:test-cpu"
PROJECT = "vllm-launch-test"
pytestmark = pytest.mark.timeout(900)


def compose(*words, files=(), environ=()):
    """Run ``docker compose`` and return its stdout."""
    names = [f"-f={ROOT}/compose/{name}.yaml" for name in ("compose", *files)]
    done = subprocess.run(
        ["docker", "compose", f"-p={PROJECT}", *names, *words],
        env=os.environ | {"VLLM_IMAGE": IMAGE} | dict(environ), check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def resolved(*files, **environ):
    """Return the stack's configuration with all profiles, as Compose resolves it."""
    return json.loads(compose("--profile=*", "config", "--format=json", files=files, environ=environ))


FILES = [
    [name for name, used in zip(("compose.cpu", "compose.keys"), combination, strict=True) if used]
    for combination in itertools.product([False, True], repeat=2)
]
"""Every combination of the files on top of compose.yaml."""


@pytest.mark.parametrize("files", FILES, ids=lambda files: "+".join(files) or "gpu")
@pytest.mark.parametrize("profile", [(), ("--profile=monitoring",)], ids=["alone", "monitoring"])
def test_every_combination_is_valid(files, profile):
    compose(*profile, "config", "-q", files=files, environ={"API_KEY_FILE": "/keys"})


def test_without_keys_the_api_listens_only_on_127_0_0_1():
    (api,) = resolved()["services"]["vllm"]["ports"]
    assert api["host_ip"] == "127.0.0.1"
    service = resolved("compose.keys", API_KEY_FILE="/keys")["services"]["vllm"]
    (api,) = service["ports"]
    assert api["host_ip"] == "0.0.0.0"
    assert service["environment"]["LAUNCH_API_KEY_FILE"] == "/run/secrets/api_keys"
    assert {secret["source"] for secret in service["secrets"]} == {"hf_token", "api_keys"}


def test_every_other_port_listens_only_on_127_0_0_1():
    services = resolved("compose.keys", API_KEY_FILE="/keys")["services"]
    ports = [port for name, service in services.items() if name != "vllm" for port in service["ports"]]
    assert len(ports) == 3
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_the_grace_period_equals_the_drain_time():
    service = resolved(DRAIN_SECONDS="45")["services"]["vllm"]
    assert service["stop_grace_period"] == "45s"
    assert service["environment"]["LAUNCH_DRAIN_SECONDS"] == "45"


def test_gpus_are_requested_except_in_the_cpu_file():
    (device,) = resolved()["services"]["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}
    assert "deploy" not in resolved("compose.cpu")["services"]["vllm"]


def test_every_container_is_locked_down():
    for name, service in resolved()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"], name


# ---- starting and stopping


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Start vLLM on the CPU, Prometheus and Alertmanager. Return their ports. Remove all at the end, also the volumes."""
    for name in ("prometheus", "alertmanager"):
        subprocess.run(
            ["docker", "build", "-q", "--network=host", f"--target={name}", f"-t=stand-in-{name}", str(HERE)],
            env=os.environ | {"DOCKER_BUILDKIT": "1"}, check=True, capture_output=True, timeout=600,
        )  # fmt: skip
    folder = tmp_path_factory.mktemp("stack")
    generate_tiny_model(folder / "models/tiny-chat")
    config = folder / "config.yaml"
    config.write_text(
        "model: /models/tiny-chat\nserved-model-name: tiny\nenforce-eager: true\nmax-model-len: 512\nmax-num-seqs: 8\n"
    )
    let_anybody_read(folder)
    ports = {name: free_port() for name in ("API_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT")}
    environ = {
        "MODELS": str(folder / "models"), "CONFIG": str(config), "PROMETHEUS_IMAGE": "stand-in-prometheus",
        "ALERTMANAGER_IMAGE": "stand-in-alertmanager", **{name: str(port) for name, port in ports.items()},
    }  # fmt: skip
    try:
        compose("--profile=monitoring", "up", "-d", "--wait", "vllm", "prometheus", "alertmanager",
                files=["compose.cpu"], environ=environ)  # fmt: skip
        yield ports
    finally:
        log = compose("logs", "--no-color", "vllm", files=["compose.cpu"], environ=environ)
        compose("--profile=*", "down", "-v", files=["compose.cpu"], environ=environ)
        print(log[-3000:])


def ask(port, path, body=None):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body and json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_up_waits_until_the_model_serves_and_every_target_is_scraped(stack):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7}
    assert ask(stack["API_PORT"], "/v1/chat/completions", chat)["usage"]["completion_tokens"] == 7

    def targets():
        active = ask(stack["PROMETHEUS_PORT"], "/api/v1/targets")["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in active}

    wait_until(lambda: set(targets().values()) == {"up"})
    assert set(targets()) == {"vllm", "vllm-health", "prometheus", "alertmanager"}


def test_alerts_and_recording_rules_are_loaded_and_grafana_has_the_dashboards(stack):
    rules = ask(stack["PROMETHEUS_PORT"], "/api/v1/rules")["data"]["groups"]
    shipped = yaml.safe_load((ROOT / "monitoring/prometheus/rules/vllm.yaml").read_text())["groups"]
    assert {group["name"]: len(group["rules"]) for group in rules} == {
        group["name"]: len(group["rules"]) for group in shipped
    }
    wait_until(lambda: all(rule["health"] == "ok" for group in ask(stack["PROMETHEUS_PORT"], "/api/v1/rules")["data"]["groups"]
                      for rule in group["rules"]))  # fmt: skip

    def namespaces():
        series = ask(stack["PROMETHEUS_PORT"], "/api/v1/query?query=model:vllm_health_ready:sum")["data"]["result"]
        return [sample["metric"]["namespace"] for sample in series]

    wait_until(namespaces)  # before the first scrape, the rules are healthy but have recorded nothing
    assert namespaces() == ["compose"]
    folders = {volume["target"]: Path(volume["source"]) for volume in resolved()["services"]["grafana"]["volumes"]}
    assert len(list(folders["/var/lib/dashboards"].glob("*.json"))) == 5


def test_a_request_is_counted_in_prometheus(stack):
    def tokens():
        query = urllib.parse.quote("vllm:generation_tokens_total")
        series = ask(stack["PROMETHEUS_PORT"], f"/api/v1/query?query={query}")["data"]["result"]
        return float(series[0]["value"][1]) if series else 0.0

    before = tokens()
    ask(stack["API_PORT"], "/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 11, "ignore_eos": True})
    wait_until(lambda: tokens() >= before + 11)
    series = ask(stack["PROMETHEUS_PORT"], "/api/v1/query?query=vllm_health_ready")["data"]["result"]
    assert [sample["value"][1] for sample in series] == ["1"]


@pytest.mark.usefixtures("stack")
def test_down_removes_containers_volumes_and_networks():
    """Last test of this file: it removes the stack."""
    compose("--profile=*", "down", "-v", files=["compose.cpu"])
    for kind in ("container", "volume", "network"):
        remaining = subprocess.run(
            ["docker", kind, "ls", "-q", f"--filter=label=com.docker.compose.project={PROJECT}"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert remaining == "", kind
