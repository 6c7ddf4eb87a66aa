"""One release of two replicas. Tests install, roll, drain, break and scale it, in this order.

During each step, long streams run through the Service, each on one pod, and short requests on new and on kept
connections. No stream may be cut and no request may fail.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import SERVER, Namespace, Release, kubectl, traffic, until

pytestmark = pytest.mark.timeout(3000)
LONG, SHORT = 2400, 400
"""Tokens of a stream. With 100 streams on two cores, a LONG one takes over a minute and a SHORT one some seconds."""
KEY = "key-of-a-client"
WRONG, WHY = {"model": "/models/missing"}, "model /models/missing: "
STOP_ENGINE = "for p in /proc/[0-9]*; do grep -aq VLLM::[E]ngineCore $p/cmdline && kill -STOP ${p#/proc/}; done; true"
"""Stops the engine's processes. The brackets keep the pattern from matching the shell that runs this."""


@pytest.fixture(scope="module")
def namespace():
    namespace = Namespace("vllm-launch-release")
    try:
        namespace.generate_model()
        namespace.kubectl("create", "secret", "generic", "client-keys", f"--from-literal=keys={KEY}")
        yield namespace
    finally:
        namespace.delete()


@pytest.fixture(scope="module")
def release(namespace):
    release = Release(namespace)
    release.upgrade("--wait=watcher", "--timeout=10m", replicas=2, apiKeys={"existingSecret": "client-keys"})
    return release


@pytest.fixture
def upgrade(release):
    """Returns a function that upgrades the release with changes to the values that all tests share."""

    def upgrade_with(*words, check=True, **changed):
        return release.upgrade(
            *words, check=check, **{"replicas": 2, "apiKeys": {"existingSecret": "client-keys"}} | changed
        )

    return upgrade_with


def assert_nothing_lost(results, at_least):
    assert results["cuts"] == 0, results
    assert results["failures"] == 0, results
    assert results["streams"] >= at_least


def ask(release, path, key=KEY, body=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(release.url() + path, body and json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_helm_waits_until_vllm_serves_and_helm_test_passes(release, namespace):
    assert release.helm("test", "--timeout=2m").returncode == 0
    assert "stream" in namespace.kubectl("logs", f"{release.name}-smoke")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    assert ask(release, "/v1/chat/completions", body=chat)[1]["usage"]["completion_tokens"] == 5
    assert ask(release, "/v1/models", key="another")[0] == 401
    assert len(release.endpoints()) == 2


def test_an_api_key_is_only_in_its_secret(release, namespace):
    (pod, *_) = release.pods()
    name = pod["metadata"]["name"]
    outputs = [
        namespace.kubectl("get", "configmap,deployment,pod", "-o", "yaml"),
        namespace.kubectl("describe", "pod", name),
        namespace.kubectl("logs", name),
        release.inside(name, "env; cat /proc/*/cmdline | tr '\\0' ' '"),
        release.helm("get", "manifest").stdout,
    ]
    assert not [text for text in outputs if KEY in text]


def test_a_new_configuration_rolls_both_replicas_and_cuts_none_of_a_hundred_streams(release, upgrade):
    before = {pod["metadata"]["name"] for pod in release.pods()}
    with traffic(release.url(), 100, LONG, KEY) as results:
        upgrade(config={"max-num-seqs": 120})
        release.wait(2400)  # under load a drain of LONG streams takes 5 minutes a replica
    assert not before & {pod["metadata"]["name"] for pod in release.pods()}
    assert_nothing_lost(results, 100)
    assert results["shortest_s"] >= 60
    assert results["requests"] > 100


def test_a_deleted_pod_finishes_its_streams(release, namespace):
    with traffic(release.url(), 20, SHORT, KEY) as results:
        (pod, *_) = release.pods()
        namespace.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        until(lambda: pod["metadata"]["name"] not in release.endpoints(), 60)
        release.wait()
    assert_nothing_lost(results, 20)


@pytest.mark.long
def test_a_node_drain_keeps_a_replica_until_the_other_is_ready(release):
    node = release.pods()[0]["spec"]["nodeName"]
    names = {pod["metadata"]["name"] for pod in release.pods()}
    with traffic(release.url(), 20, SHORT, KEY) as results:
        draining = subprocess.Popen(
            ["kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=600s",
             f"--pod-selector=app.kubernetes.io/instance={release.name},app.kubernetes.io/component=server"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            until(lambda: len(release.endpoints()) == 1, 120)
            time.sleep(20)  # the budget keeps the second pod, because the first pod's replacement has no node
            assert draining.poll() is None
            assert len(release.endpoints() & names) == 1
            kubectl("uncordon", node)
            until(lambda: len(release.endpoints()) == 2, 300)
            assert draining.poll() is None or draining.returncode == 0
        finally:
            draining.kill()
            draining.communicate()
            kubectl("uncordon", node)
        release.wait()
    assert_nothing_lost(results, 20)


def test_a_configuration_that_cannot_start_is_rolled_back_with_a_reason(release, namespace, upgrade):
    names = {pod["metadata"]["name"] for pod in release.pods()}
    with traffic(release.url(), 20, SHORT, KEY) as results, ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        upgrading = pool.submit(upgrade, "--rollback-on-failure", "--timeout=60s", check=False, config=WRONG)
        until(lambda: WHY in namespace.kubectl("describe", "pods", "-l", SERVER), 60)
        assert upgrading.result().returncode != 0
        took = time.monotonic() - began
        release.wait()
    print(f"helm gave up and rolled back after {took:.0f} s")
    assert took < 300
    assert_nothing_lost(results, 20)
    assert names & {pod["metadata"]["name"] for pod in release.pods()}


@pytest.mark.long
def test_an_old_pod_that_dies_during_a_failing_upgrade_restarts_unchanged(release, upgrade):
    """Its container starts with its old configuration, although the release has a new one."""
    names = {pod["metadata"]["name"] for pod in release.pods()}
    upgrade(config=WRONG)
    (old,) = until(lambda: [name for name in release.endpoints() if name in names and len(release.endpoints()) == 1])
    release.inside(old, STOP_ENGINE.replace("STOP", "KILL"))
    until(lambda: restarts(release, old) == 1, 60)
    until(lambda: release.endpoints() == {old}, 200)
    upgrade()
    release.wait()


@pytest.mark.long
def test_a_hanging_engine_leaves_the_endpoints_and_is_restarted(release, upgrade):
    upgrade(config={"launch": {"drain_seconds": 60, "stall_seconds": 20}})
    release.wait()
    (pod, *_) = release.pods()
    name = pod["metadata"]["name"]
    release.inside(name, STOP_ENGINE)
    began = time.monotonic()
    until(lambda: name not in release.endpoints(), 60)
    print(f"out of the endpoints after {time.monotonic() - began:.0f} s")
    until(lambda: restarts(release, name) == 1, 90)
    until(lambda: name in release.endpoints(), 200)
    (status,) = [p["status"]["containerStatuses"][0] for p in release.pods() if p["metadata"]["name"] == name]
    assert (
        "hang" in status["lastState"]["terminated"]["message"]
        or "answer" in status["lastState"]["terminated"]["message"]
    )


def restarts(release, name):
    return sum(
        pod["status"]["containerStatuses"][0]["restartCount"]
        for pod in release.pods()
        if pod["metadata"]["name"] == name
    )


@pytest.mark.long
def test_a_pod_that_kubelet_evicts_is_replaced(release, namespace):
    """kubelet evicts the pod because it writes more than the size limit of its cache."""
    (pod, other) = release.pods()
    name = pod["metadata"]["name"]
    release.inside(name, "head -c 1200M /dev/zero > /cache/too-much")
    until(lambda: name not in release.endpoints(), 180)
    assert other["metadata"]["name"] in release.endpoints()
    assert until(lambda: namespace.get(f"pod/{name}")["status"].get("reason")) == "Evicted"
    namespace.kubectl("delete", "pod", name)
    release.wait()


@pytest.mark.long
def test_vllm_serves_without_the_kubernetes_api_server(release):
    """Stops the API server's process for a minute, on this machine."""
    pids = subprocess.run(["pgrep", "-x", "kube-apiserver"], check=False, capture_output=True, text=True).stdout.split()
    assert pids, "kube-apiserver does not run on this machine. This test stops its process, so it needs a local cluster"
    url = release.url()
    with traffic(url, 5, SHORT, KEY) as results:
        os.kill(int(pids[0]), signal.SIGSTOP)
        try:
            time.sleep(60)
        finally:
            os.kill(int(pids[0]), signal.SIGCONT)
    assert_nothing_lost(results, 5)
    until(lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok", 60)
    time.sleep(20)  # time for controllers to react to missed leases
    assert len(release.endpoints()) == 2


@pytest.mark.long
def test_replicas_that_are_scaled_down_finish_their_streams(release, upgrade):
    upgrade(replicas=3)
    release.wait()
    with traffic(release.url(), 30, SHORT, KEY) as results:
        upgrade(replicas=1)
        until(lambda: len(release.endpoints()) == 1, 60)
        release.wait()
    assert_nothing_lost(results, 30)


def test_uninstall_leaves_nothing(release, namespace):
    """Must be the last test of this file."""
    release.helm("uninstall", "--wait", "--timeout=5m")
    kinds = "deployment,replicaset,service,configmap,secret,serviceaccount,networkpolicy,pdb,job"
    until(lambda: not namespace.get(kinds, "-l", f"app.kubernetes.io/instance={release.name}")["items"], 120)
