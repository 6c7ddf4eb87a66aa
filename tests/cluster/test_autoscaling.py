"""KEDA and its HPA scale a release by vLLM's waiting requests, which they query from a real Prometheus."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time

import pytest
from cluster import SERVER, Namespace, Release, kubectl, traffic, until
from machine import ROOT, free_port

pytestmark = [pytest.mark.timeout(1500), pytest.mark.long]


@pytest.fixture(scope="module")
def namespace():
    assert "scaledobjects.keda.sh" in kubectl("get", "crd", "-o", "name"), "KEDA is not installed on this cluster"
    scaled = Namespace("vllm-launch-scaled")
    try:
        scaled.generate_model()
        yield scaled
    finally:
        scaled.delete()


@pytest.fixture
def prometheus(tmp_path, namespace):
    """A Prometheus on this machine, from Debian's package. It gets the list of pods as from a PodMonitor."""
    subprocess.run(
        ["docker", "build", "-q", "--network=host", "--target=prometheus", "-t=stand-in-prometheus", str(ROOT / "tests/compose")],
        env=os.environ | {"DOCKER_BUILDKIT": "1"}, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    scrape = {
        "job_name": "vllm",
        "file_sd_configs": [{"files": ["/etc/prometheus/pods.json"], "refresh_interval": "2s"}],
    }
    (tmp_path / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "5s"}, "scrape_configs": [scrape]})
    )
    (tmp_path / "pods.json").write_text("[]")
    tmp_path.chmod(0o755)
    port, ended = free_port(), threading.Event()
    name = subprocess.run(
        ["docker", "run", "-d", "--rm", "--network=host", f"-v={tmp_path}:/etc/prometheus:ro", "stand-in-prometheus",
         "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/tmp/data", f"--web.listen-address=127.0.0.1:{port}"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip

    def discover():
        while not ended.wait(3):
            pods = [pod for pod in namespace.get("pods", "-l", SERVER)["items"] if pod["status"].get("podIP")]
            targets = [{"targets": [f"{pod['status']['podIP']}:8000"],
                      "labels": {"namespace": namespace.name, "pod": pod["metadata"]["name"]}} for pod in pods]  # fmt: skip
            (tmp_path / "pods.json").write_text(json.dumps(targets))

    thread = threading.Thread(target=discover)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    ended.set()
    thread.join()
    subprocess.run(["docker", "rm", "-f", name], check=True, capture_output=True)


def test_waiting_requests_add_a_replica_and_idleness_removes_it(namespace, prometheus):
    release = Release(namespace, "scaled")
    keda = {"by": "keda", "min": 1, "max": 2, "quietMinutes": 0, "prometheus": prometheus}
    release.upgrade(autoscaling=keda, config={"max-num-seqs": 4})
    release.wait()
    until(lambda: "True" in namespace.kubectl("get", "scaledobject", "scaled", "-o", READY), 90)
    began = time.monotonic()
    with traffic(release.url(), 30, 400) as results:
        until(lambda: len(release.pods()) == 2, 180)
        print(f"a second pod after {time.monotonic() - began:.0f} s")
        until(lambda: len(release.endpoints()) == 2, 300)
    began = time.monotonic()
    until(lambda: len(release.endpoints()) == 1, 600)
    print(f"and gone {time.monotonic() - began:.0f} s after the last request")
    assert results["cuts"] == results["failures"] == 0, results


READY = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
