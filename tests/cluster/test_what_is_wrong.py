"""Mistakes of users: `kubectl describe` shows one useful sentence, and nothing is left half-done."""

from __future__ import annotations

import time

import pytest
from cluster import REPOSITORY, SERVER, Namespace, Release, apply, until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def namespace():
    """A namespace with a simulated hub. No test uses the real hub."""
    namespace = Namespace("vllm-launch-wrong")
    try:
        namespace.generate_model()
        namespace.run_hub()
        yield namespace
    finally:
        namespace.delete()


HUB = {"env": [{"name": "HF_ENDPOINT", "value": "http://hub:8080"}, {"name": "HF_HUB_DISABLE_XET", "value": "1"}]}
SMALL = {
    "volumes": [{"name": "small", "emptyDir": {"medium": "Memory", "sizeLimit": "512Ki"}}],
    "volumeMounts": [{"name": "small", "mountPath": "/cache/compiled"}],
}
WRONG = {
    "missing-model": ({"config": {"model": "/models/nothing"}}, "model /models/nothing: "),
    "too-long": (
        {"config": {"model": "/models/tiny-chat", "max-model-len": 99999}, "env": []},
        "the model supports at most 2048 tokens, and vLLM refuses more; lower it",
    ),
    "gated-simulated": ({"config": {"model": "some/gated"}} | HUB, "model some/gated: is gated; accept its licence at"),
    "no-such-model-simulated": ({"config": {"model": "some/other"}} | HUB, "there is no such model on the hub"),
    "wrong-token-simulated": (
        {"config": {"model": "some/model"}, "hfToken": {"token": "hf_wrong"}} | HUB,
        "model some/model: the hub rejects the token (HTTP 401); set HF_TOKEN to a valid token",
    ),
    "full-volume": (SMALL, "cannot be written: No space left on device; free disk space"),
    "no-key-in-the-secret": ({"apiKeys": {"existingSecret": "empty"}}, "the file holds no key; write one key per line"),
    "no-secret": ({"apiKeys": {"existingSecret": "nowhere"}}, 'secret "nowhere" not found'),
    "image-that-may-not-be-pulled": ({"image": {"repository": f"{REPOSITORY}-private"}}, "Failed to pull image"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(namespace):
    """One release for each mistake, all at the same time. Deleting the namespace removes them."""
    empty = {"name": "empty", "namespace": namespace.name}
    apply({"apiVersion": "v1", "kind": "Secret", "metadata": empty, "stringData": {"keys": "\n"}})
    releases = {mistake: Release(namespace, f"wrong-{mistake}") for mistake in WRONG}
    for mistake, release in releases.items():
        release.upgrade(**{"resources": SMALL_POD} | WRONG[mistake][0])
    return releases


SMALL_POD = {"cpu": "50m", "memory": "1Gi"}
"""Resources of a release. All fit on a node of 20 GiB, with the 1 GiB of /dev/shm that the chart adds to each."""


@pytest.mark.parametrize("mistake", WRONG)
def test_kubectl_describe_shows_the_reason(wrong, mistake):
    message = WRONG[mistake][1]
    described = until(lambda: description_with(wrong[mistake], message), 90)
    lines = {
        line.strip().removeprefix("Message:").strip()
        for line in described.splitlines()
        if message in line and "Message:" in line
    }
    assert all(line.startswith("vllm-launch: ") for line in lines)  # only the launcher's own line
    assert len(lines) == (mistake not in {"no-secret", "image-that-may-not-be-pulled"})
    assert "Traceback" not in described
    assert "hf_wrong" not in described


def description_with(release, message):
    """Return the description of the release's pods if it has ``message``, else None."""
    pods = f"{SERVER},app.kubernetes.io/instance={release.name}"
    described = release.namespace.kubectl("describe", "pods", "-l", pods)
    return described if message in described else None


def test_helm_test_fails_with_one_line_if_nothing_serves(wrong, namespace):
    release = wrong["missing-model"]
    assert release.helm("test", "--timeout=2m", check=False).returncode != 0
    (line,) = namespace.kubectl("logs", f"{release.name}-smoke").splitlines()
    release.helm("uninstall", "--wait", "--timeout=3m")
    assert line.startswith(f"FAIL  models: http://{release.name}:8000 cannot be reached")
    assert "Traceback" not in line


@pytest.fixture
def alone(wrong):
    """Uninstalls the other releases, whose containers would restart again and again during this test."""
    for release in wrong.values():
        release.helm("uninstall", "--ignore-not-found", "--timeout=3m")


@pytest.mark.usefixtures("alone")
def test_a_killed_download_does_not_repeat_complete_files_simulated(namespace):
    """The Job's pod is killed in the middle of the largest file. The server waits until the download is complete."""
    namespace.claim("cache")
    release = Release(namespace, "fetched")
    cache = {"kind": "claim", "existingClaim": "cache"}
    variables = [*HUB["env"], {"name": "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "value": "1"}]
    release.upgrade(config={"model": "some/model"}, cache=cache, download={"enabled": True}, env=variables)
    try:
        until(
            lambda: hub_count(namespace, "GET", "large.data") and hub_count(namespace, "SENT", "model.safetensors"), 90
        )
        time.sleep(5)  # for the client to move complete files to their final paths
        large, whole = (hub_count(namespace, "GET", name) for name in ("large.data", "model.safetensors"))
        assert whole
        pod = namespace.kubectl("get", "pods", "-l", "app.kubernetes.io/component=download", "-o", "name").strip()
        namespace.kubectl("delete", pod, "--grace-period=0", "--force")
        until(lambda: hub_count(namespace, "GET", "large.data") > large, 90)
        waiting = namespace.kubectl("logs", "deployment/fetched", "-c", "wait-for-download")
        assert set(waiting.splitlines()) == {"some/model: waiting until it is downloaded"}
        namespace.kubectl("exec", "hub", "--", "touch", "/tmp/quick")
        release.wait()
        assert hub_count(namespace, "GET", "model.safetensors") == whole
        assert release.helm("test", "--timeout=2m").returncode == 0
    finally:
        print(namespace.kubectl("logs", "hub"))
        release.helm("uninstall", "--wait", "--timeout=3m")


def hub_count(namespace, verb, name):
    """Return the number of requests (GET) or complete transfers (SENT). Clients repeat a GET after 10 s of silence."""
    lines = namespace.kubectl("logs", "hub").splitlines()
    return sum(line.startswith(f"{verb} ") and line.endswith(f"/{name}") for line in lines)
