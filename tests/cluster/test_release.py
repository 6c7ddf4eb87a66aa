"""One release of two replicas through its life, in this order: installed, rolled, drained, broken, scaled.

Long streams run through the Service all the while, each on the pod it began on, and short requests on new and on kept
connections. Nothing may be cut and nothing may fail.
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
"""Tokens of a stream: above a minute with a hundred of them at a time on two cores, and some seconds."""
KEY = "key-of-a-client"
WRONG, WHY = {"model": "/models/missing"}, "model /models/missing: "
STOP_ENGINE = "for p in /proc/[0-9]*; do grep -aq VLLM::[E]ngineCore $p/cmdline && kill -STOP ${p#/proc/}; done; true"
"""The brackets keep the pattern from finding the shell that runs this."""


@pytest.fixture(scope="module")
def namespace():
    one = Namespace("vllm-launch-release")
    try:
        one.generate_model()
        one.kubectl("create", "secret", "generic", "client-keys", f"--from-literal=keys={KEY}")
        yield one
    finally:
        one.delete()


@pytest.fixture(scope="module")
def release(namespace):
    one = Release(namespace)
    one.upgrade("--wait=watcher", "--timeout=10m", replicas=2, apiKeys={"existingSecret": "client-keys"})
    return one


@pytest.fixture
def upgrade(release):
    """Changes values, on top of those that all tests here share."""

    def one(*words, check=True, **changed):
        return release.upgrade(
            *words, check=check, **{"replicas": 2, "apiKeys": {"existingSecret": "client-keys"}} | changed
        )

    return one


def nothing_lost(became, at_least):
    assert became["cuts"] == 0, became
    assert became["failures"] == 0, became
    assert became["streams"] >= at_least


def ask(release, path, key=KEY, body=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(release.url() + path, body and json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_helm_waits_until_it_serves_and_its_test_passes(release, namespace):
    assert release.helm("test", "--timeout=2m").returncode == 0
    assert "stream" in namespace.kubectl("logs", f"{release.name}-smoke")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    assert ask(release, "/v1/chat/completions", body=chat)[1]["usage"]["completion_tokens"] == 5
    assert ask(release, "/v1/models", key="another")[0] == 401
    assert len(release.endpoints()) == 2


def test_a_key_is_in_its_secret_alone(release, namespace):
    (pod, *_) = release.pods()
    name = pod["metadata"]["name"]
    said = [
        namespace.kubectl("get", "configmap,deployment,pod", "-o", "yaml"),
        namespace.kubectl("describe", "pod", name),
        namespace.kubectl("logs", name),
        release.inside(name, "env; cat /proc/*/cmdline | tr '\\0' ' '"),
        release.helm("get", "manifest").stdout,
    ]
    assert not [text for text in said if KEY in text]


def test_a_new_configuration_rolls_both_replicas_and_cuts_none_of_a_hundred_streams(release, upgrade):
    before = {pod["metadata"]["name"] for pod in release.pods()}
    with traffic(release.url(), 100, LONG, KEY) as became:
        upgrade(config={"max-num-seqs": 120})
        release.wait(900)
    assert not before & {pod["metadata"]["name"] for pod in release.pods()}
    nothing_lost(became, 100)
    assert became["shortest_s"] >= 60
    assert became["requests"] > 100


def test_a_pod_that_is_deleted_finishes_its_streams(release, namespace):
    with traffic(release.url(), 20, SHORT, KEY) as became:
        (pod, *_) = release.pods()
        namespace.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        until(lambda: pod["metadata"]["name"] not in release.endpoints(), 60)
        release.wait()
    nothing_lost(became, 20)


@pytest.mark.long
def test_a_node_that_is_drained_keeps_a_replica_until_the_other_is_back(release):
    node = release.pods()[0]["spec"]["nodeName"]
    names = {pod["metadata"]["name"] for pod in release.pods()}
    with traffic(release.url(), 20, SHORT, KEY) as became:
        draining = subprocess.Popen(
            ["kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=600s",
             f"--pod-selector=app.kubernetes.io/instance={release.name},app.kubernetes.io/component=server"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            until(lambda: len(release.endpoints()) == 1, 120)
            time.sleep(20)  # the budget holds the second one, for the first one's successor has no node
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
    nothing_lost(became, 20)


def test_a_configuration_that_cannot_start_is_rolled_back_in_time_and_says_why(release, namespace, upgrade):
    names = {pod["metadata"]["name"] for pod in release.pods()}
    with traffic(release.url(), 20, SHORT, KEY) as became, ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        upgrading = pool.submit(upgrade, "--rollback-on-failure", "--timeout=60s", check=False, config=WRONG)
        until(lambda: WHY in namespace.kubectl("describe", "pods", "-l", SERVER), 60)
        assert upgrading.result().returncode != 0
        took = time.monotonic() - began
        release.wait()
    print(f"helm gave up and rolled back after {took:.0f} s")
    assert took < 300
    nothing_lost(became, 20)
    assert names & {pod["metadata"]["name"] for pod in release.pods()}


@pytest.mark.long
def test_an_old_pod_that_dies_during_a_failing_upgrade_comes_back_as_it_was(release, upgrade):
    """Its container finds its own configuration, although the release has another by now."""
    names = {pod["metadata"]["name"] for pod in release.pods()}
    upgrade(config=WRONG)
    (old,) = until(lambda: [name for name in release.endpoints() if name in names and len(release.endpoints()) == 1])
    release.inside(old, STOP_ENGINE.replace("STOP", "KILL"))
    until(lambda: restarts(release, old) == 1, 60)
    until(lambda: release.endpoints() == {old}, 200)
    upgrade()
    release.wait()


@pytest.mark.long
def test_an_engine_that_hangs_is_out_of_the_endpoints_and_comes_back(release, upgrade):
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
    """For what it wrote: more than its cache may hold."""
    (pod, other) = release.pods()
    name = pod["metadata"]["name"]
    release.inside(name, "head -c 1200M /dev/zero > /cache/too-much")
    until(lambda: name not in release.endpoints(), 180)
    assert other["metadata"]["name"] in release.endpoints()
    assert until(lambda: namespace.get(f"pod/{name}")["status"].get("reason")) == "Evicted"
    namespace.kubectl("delete", "pod", name)
    release.wait()


@pytest.mark.long
def test_without_an_api_server_it_serves_on(release):
    """The process is stopped for a minute, on the machine that runs it."""
    found = subprocess.run(
        ["pgrep", "-x", "kube-apiserver"], check=False, capture_output=True, text=True
    ).stdout.split()
    assert found, "kube-apiserver runs elsewhere: this test stops its process, so it needs a cluster on this machine"
    url = release.url()
    with traffic(url, 5, SHORT, KEY) as became:
        os.kill(int(found[0]), signal.SIGSTOP)
        try:
            time.sleep(60)
        finally:
            os.kill(int(found[0]), signal.SIGCONT)
    nothing_lost(became, 5)
    until(lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok", 60)
    time.sleep(20)  # what missed its leases may act on it now
    assert len(release.endpoints()) == 2


@pytest.mark.long
def test_replicas_that_go_finish_their_streams(release, upgrade):
    upgrade(replicas=3)
    release.wait()
    with traffic(release.url(), 30, SHORT, KEY) as became:
        upgrade(replicas=1)
        until(lambda: len(release.endpoints()) == 1, 60)
        release.wait()
    nothing_lost(became, 30)


def test_uninstalled_it_leaves_nothing(release, namespace):
    """The last of this file."""
    release.helm("uninstall", "--wait", "--timeout=5m")
    kinds = "deployment,replicaset,service,configmap,secret,serviceaccount,networkpolicy,pdb,job"
    until(lambda: not namespace.get(kinds, "-l", f"app.kubernetes.io/instance={release.name}")["items"], 120)
