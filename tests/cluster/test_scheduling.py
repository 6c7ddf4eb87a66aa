"""Scheduling of pods and rollout of a fleet, on nodes that kwok simulates. The scheduler and the controllers are real,
nodes and containers are not. FLEET is the number of nodes, 50 by default. `make soak` uses 1000."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest
from cluster import HERE, Namespace, Release, apply, kubectl, until

pytestmark = pytest.mark.timeout(3000)
FLEET = int(os.environ.get("FLEET", "50"))
GPUS = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def kwok():
    """Runs kwok, which simulates the nodes with its annotation and their pods."""
    if shutil.which("kwok") is None:
        pytest.fail("kwok is not installed: go install sigs.k8s.io/kwok/cmd/kwok@v0.8.0", pytrace=False)
    process = subprocess.Popen(
        ["kwok", f"--kubeconfig={os.environ['KUBECONFIG']}", f"--config={HERE / 'stages.yaml'}", "--node-lease-duration-seconds=40",
         "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield process
    process.terminate()
    process.wait(30)


@pytest.fixture
def nodes(kwok):
    """Returns a function that creates nodes with ``gpus`` GPUs each. Deletes them at the end."""
    assert kwok.poll() is None, "kwok ended"

    def make(names, gpus):
        capacity = {"cpu": "128", "memory": "1Ti", "pods": "110", "ephemeral-storage": "2Ti", GPUS: str(gpus)}
        apply(*[{
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"simulated": "true", "kubernetes.io/hostname": name},
                         "annotations": {"kwok.x-k8s.io/node": "fake"}},
            "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in (GPUS, "simulated")]},
            "status": {"capacity": capacity, "allocatable": capacity},
        } for name in names])  # fmt: skip
        kubectl("wait", "--for=condition=Ready", *[f"node/{name}" for name in names], "--timeout=300s", timeout=310)

    yield make
    kubectl("delete", "node", "-l", "simulated=true", "--wait=false")


@pytest.fixture
def release():
    namespace = Namespace("vllm-launch-fleet")
    try:
        yield Release(namespace)
    finally:
        namespace.delete()


def scheduled(release):
    """Return {pod: its node, or None}."""
    return {pod["metadata"]["name"]: pod["spec"].get("nodeName") for pod in release.pods()}


HUB = {
    "config": {"model": "some/model"}, "models": {"claim": ""}, "resources": {"cpu": "100m", "memory": "16Gi"},
    "scheduling": {"tolerations": [{"key": key, "operator": "Exists"} for key in (GPUS, "simulated")]},
}  # fmt: skip


def test_a_pod_is_scheduled_on_a_node_with_enough_gpus_simulated(nodes, release):
    nodes(["two-gpus"], 2)
    nodes(["four-gpus"], 4)
    release.upgrade(gpus={"count": 4}, replicas=2, **HUB)
    until(lambda: "four-gpus" in scheduled(release).values(), 60)
    time.sleep(5)
    assert sorted(map(str, scheduled(release).values())) == ["None", "four-gpus"]
    waiting = next(pod for pod, node in scheduled(release).items() if node is None)
    assert f"Insufficient {GPUS}" in release.namespace.kubectl("describe", "pod", waiting)
    release.helm("uninstall", "--wait", "--timeout=2m")
    release.upgrade(gpus={"count": 2}, replicas=3, **HUB)
    until(lambda: sorted(map(str, scheduled(release).values())) == ["four-gpus", "four-gpus", "two-gpus"], 120)
    for pod in release.pods():
        volumes = [volume.get("emptyDir") for volume in pod["spec"]["volumes"]]
        assert {"medium": "Memory", "sizeLimit": "2Gi"} in volumes


def test_without_a_gpu_node_the_notes_say_so_simulated(release):
    notes = release.upgrade(gpus={"count": 1}, **HUB).stdout
    assert f"No node offers 1 {GPUS}" in notes


@pytest.mark.long
def test_a_fleet_rolls_within_its_budget_simulated(nodes, release):
    """Available replicas, pods and evictions stay within the limits that the values set."""
    replicas, share = 2 * FLEET, 0.1
    began = time.monotonic()
    for start in range(0, FLEET, 200):
        nodes([f"fleet-{number}" for number in range(start, min(start + 200, FLEET))], 8)
    print(f"{FLEET} nodes after {time.monotonic() - began:.0f} s")
    fleet = HUB | {"gpus": {"count": 4}, "replicas": replicas, "rollout": {"atOnce": "10%"}}
    release.upgrade(**fleet)
    until(lambda: status(release).get("availableReplicas") == replicas, 1500)
    print(f"{replicas} replicas after {time.monotonic() - began:.0f} s")
    limit = int(replicas * share)
    began, calls = time.monotonic(), api_calls()
    release.upgrade(**fleet, podAnnotations={"rolled": "once"})
    samples = []

    def rolled():
        current = status(release)
        samples.extend([(current.get("availableReplicas", 0), current["replicas"])] if current else [])
        return current.get("updatedReplicas") == current.get("availableReplicas") == replicas == current.get("replicas")

    until(rolled, 2400, every=0.5)
    took = time.monotonic() - began
    print(f"rolled in {took:.0f} s, {(api_calls() - calls) / replicas:.1f} API calls a replica, {len(samples)} samples")
    assert min(available for available, _ in samples) >= replicas - limit
    assert max(total for _, total in samples) <= replicas
    assert len(samples) > 10
    names = [pod["metadata"]["name"] for pod in release.pods()]
    kubectl("cordon", "-l", "simulated=true")  # else replacements of evicted pods become ready at once
    evicted = [evict(release, name) for name in names[: limit + 5]]
    assert evicted == [True] * limit + [False] * 5


def status(release):
    """Return the Deployment's status, or {} until the controller has observed the newest generation."""
    deployment = release.namespace.get(f"deployment/{release.name}")
    is_current = deployment["status"].get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    return deployment["status"] if is_current else {}


def evict(release, pod):
    """Try to evict ``pod`` and return whether the disruption budget allows it."""
    body = f'{{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {{"name": "{pod}", "namespace": "{release.namespace.name}"}}}}'
    done = subprocess.run(
        ["kubectl", "create", "--raw", f"/api/v1/namespaces/{release.namespace.name}/pods/{pod}/eviction", "-f-"],
        input=body, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode or "disruption budget" in done.stderr, done.stderr
    return done.returncode == 0


def api_calls():
    lines = kubectl("get", "--raw", "/metrics", timeout=60).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("apiserver_request_total{"))
