"""What a person sees of a mistake: one useful sentence in `kubectl describe`, and nothing half-done."""

from __future__ import annotations

import time

import pytest
from cluster import REPOSITORY, SERVER, Namespace, Release, apply, until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def namespace():
    """With a hub in it, which is simulated: none is reached from a test."""
    one = Namespace("vllm-launch-wrong")
    try:
        one.generate_model()
        one.run_hub()
        yield one
    finally:
        one.delete()


HUB = {"env": [{"name": "HF_ENDPOINT", "value": "http://hub:8080"}, {"name": "HF_HUB_DISABLE_XET", "value": "1"}]}
SMALL = {
    "volumes": [{"name": "small", "emptyDir": {"medium": "Memory", "sizeLimit": "512Ki"}}],
    "volumeMounts": [{"name": "small", "mountPath": "/cache/compiled"}],
}
WRONG = {
    "missing-model": ({"config": {"model": "/models/nothing"}}, "model /models/nothing: "),
    "too-long": (
        {"config": {"model": "/models/tiny-chat", "max-model-len": 99999}, "env": []},
        "the model itself is made for 2048 tokens and vLLM refuses more; lower it",
    ),
    "gated-simulated": ({"config": {"model": "some/gated"}} | HUB, "model some/gated: is gated; accept its licence at"),
    "no-such-model-simulated": ({"config": {"model": "some/other"}} | HUB, "there is no such model on the hub"),
    "wrong-token-simulated": (
        {"config": {"model": "some/model"}, "hfToken": {"token": "hf_wrong"}} | HUB,
        "model some/model: the hub does not know the token (HTTP 401); set HF_TOKEN to one that is valid",
    ),
    "full-volume": (SMALL, "cannot be written: No space left on device; free space there"),
    "no-key-in-the-secret": ({"apiKeys": {"existingSecret": "empty"}}, "the file holds no key; write one key per line"),
    "no-secret": ({"apiKeys": {"existingSecret": "nowhere"}}, 'secret "nowhere" not found'),
    "image-that-may-not-be-pulled": ({"image": {"repository": f"{REPOSITORY}-private"}}, "Failed to pull image"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(namespace):
    """A release for each mistake, all at once; what they leave goes with the namespace."""
    empty = {"name": "empty", "namespace": namespace.name}
    apply({"apiVersion": "v1", "kind": "Secret", "metadata": empty, "stringData": {"keys": "\n"}})
    releases = {mistake: Release(namespace, f"wrong-{mistake}") for mistake in WRONG}
    for mistake, release in releases.items():
        release.upgrade(**{"resources": SMALL_POD} | WRONG[mistake][0])
    return releases


SMALL_POD = {"cpu": "50m", "memory": "1Gi"}
"""So that a node of 20 GiB has room for all of them, and for /dev/shm of 1 GiB each, which the chart adds."""


@pytest.mark.parametrize("mistake", WRONG)
def test_describe_says_what_is_wrong(wrong, mistake):
    said = WRONG[mistake][1]
    described = until(lambda: found(wrong[mistake], said), 90)
    lines = {
        line.strip().removeprefix("Message:").strip()
        for line in described.splitlines()
        if said in line and "Message:" in line
    }
    assert all(line.startswith("vllm-launch: ") for line in lines)  # the launcher's own, and nothing but it
    assert len(lines) == (mistake not in {"no-secret", "image-that-may-not-be-pulled"})
    assert "Traceback" not in described
    assert "hf_wrong" not in described


def found(release, said):
    pods = f"{SERVER},app.kubernetes.io/instance={release.name}"
    described = release.namespace.kubectl("describe", "pods", "-l", pods)
    return described if said in described else None


def test_helm_test_says_that_nothing_serves(wrong, namespace):
    release = wrong["missing-model"]
    assert release.helm("test", "--timeout=2m", check=False).returncode != 0
    (line,) = namespace.kubectl("logs", f"{release.name}-smoke").splitlines()
    release.helm("uninstall", "--wait", "--timeout=3m")
    assert line.startswith(f"FAIL  models: http://{release.name}:8000 cannot be reached")
    assert "Traceback" not in line


@pytest.fixture
def alone(wrong):
    """No other release, whose containers would start again and again beside this test's."""
    for release in wrong.values():
        release.helm("uninstall", "--ignore-not-found", "--timeout=3m")


@pytest.mark.usefixtures("alone")
def test_a_download_that_is_ended_fetches_no_whole_file_again_simulated(namespace):
    """The Job's pod is killed in the middle of the largest file; serving waits for it all the while."""
    namespace.claim("cache")
    release = Release(namespace, "fetched")
    cache = {"kind": "claim", "existingClaim": "cache"}
    variables = [*HUB["env"], {"name": "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "value": "1"}]
    release.upgrade(config={"model": "some/model"}, cache=cache, download={"enabled": True}, env=variables)
    try:
        until(lambda: hub_says(namespace, "GET", "large.data") and hub_says(namespace, "SENT", "model.safetensors"), 90)
        time.sleep(5)  # for the client to put into its place what it has whole
        large, whole = (hub_says(namespace, "GET", name) for name in ("large.data", "model.safetensors"))
        assert whole
        pod = namespace.kubectl("get", "pods", "-l", "app.kubernetes.io/component=download", "-o", "name").strip()
        namespace.kubectl("delete", pod, "--grace-period=0", "--force")
        until(lambda: hub_says(namespace, "GET", "large.data") > large, 90)
        waiting = namespace.kubectl("logs", "deployment/fetched", "-c", "wait-for-download")
        assert set(waiting.splitlines()) == {"some/model: waiting until it is downloaded"}
        namespace.kubectl("exec", "hub", "--", "touch", "/tmp/quick")
        release.wait()
        assert hub_says(namespace, "GET", "model.safetensors") == whole
        assert release.helm("test", "--timeout=2m").returncode == 0
    finally:
        print(namespace.kubectl("logs", "hub"))
        release.helm("uninstall", "--wait", "--timeout=3m")


def hub_says(namespace, verb, name):
    """How often: GET of what was asked for, by clients that ask again when they hear nothing for 10 s, SENT of what is whole."""
    lines = namespace.kubectl("logs", "hub").splitlines()
    return sum(line.startswith(f"{verb} ") and line.endswith(f"/{name}") for line in lines)
