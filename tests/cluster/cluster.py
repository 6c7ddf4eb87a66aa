"""Namespaces, releases and traffic on the cluster of KUBECONFIG. Namespaces enforce the restricted Pod Security level.

The tests run on any cluster. Its nodes pull the image from the registry of IMAGE_REPOSITORY. A pod generates the tiny
model into a claim. Without a storage class, the claim gets a hostPath volume on the node.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from chart import CHART, helm
from machine import ROOT

HERE = Path(__file__).parent
REPOSITORY = os.environ.get("IMAGE_REPOSITORY", "127.0.0.1:5000/vllm-launch")
TAG = os.environ.get("IMAGE_TAG", "test-cpu")
RELEASE = "llama3"
SERVER = "app.kubernetes.io/component=server"


def kubectl(*words, text=None, check=True, timeout=300):
    """Run ``kubectl`` and return its stdout."""
    try:
        result = subprocess.run(
            ["kubectl", *map(str, words)], input=text, check=False, capture_output=True, text=True, timeout=timeout
        )
    except FileNotFoundError:
        pytest.fail("kubectl is not installed. These tests need it and a KUBECONFIG with a cluster", pytrace=False)
    if check and result.returncode:
        raise AssertionError(f"kubectl {' '.join(map(str, words))}: {result.stderr}")
    return result.stdout


def apply(*manifests):
    kubectl("apply", "-f-", text=yaml.safe_dump_all(manifests))


def until(condition, seconds=300, every=1.0):
    """Return the value of ``condition()`` once it is true. The error of a timeout has the pods, jobs and events."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            state = kubectl("get", "pods,jobs,events", "-A", "--sort-by=.metadata.creationTimestamp", check=False)
            raise AssertionError(f"not within {seconds} s: {condition}\n{state}")
        time.sleep(every)
    return value


class Namespace:
    """A namespace with a unique name that enforces the ``restricted`` standard."""

    def __init__(self, name):
        self.name = name = f"{name}-{secrets.token_hex(2)}"
        self.volumes = []
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        # The processes of a busy engine yield to each other in a loop while they wait. On two cores with Linux 6.18, a
        # second pod that starts then gets 2 % of a core. A CPU limit for each container leaves room for it.
        limit = {"type": "Container", "default": {"cpu": "800m"}, "defaultRequest": {"cpu": "100m"}}
        metadata = {"name": "cores", "namespace": name}
        apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
            {"apiVersion": "v1", "kind": "LimitRange", "metadata": metadata, "spec": {"limits": [limit]}},
        )

    def kubectl(self, *words, **options):
        return kubectl("-n", self.name, *words, **options)

    def get(self, *words):
        return json.loads(self.kubectl("get", "-o", "json", *words))

    def claim(self, name, size="1Gi"):
        """Create a claim. Without a storage class it gets a hostPath volume, which works only on a single node."""
        classes = json.loads(kubectl("get", "storageclass", "-o", "json"))["items"]
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}}
        if not classes:
            volume = f"{self.name}-{name}"
            path = {"path": f"/var/lib/vllm-launch-test/{volume}", "type": "DirectoryOrCreate"}
            apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
                   "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteMany"], "hostPath": path,
                            "persistentVolumeReclaimPolicy": "Delete", "storageClassName": ""}})  # fmt: skip
            spec |= {"storageClassName": "", "volumeName": volume}
            self.volumes.append(volume)
            make_writable(path["path"])
        metadata = {"name": name, "namespace": self.name}
        apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})

    def generate_model(self):
        """Generate the tiny model as /models/tiny-chat in the claim ``models``, in a pod of the image."""
        self.claim("models")
        script = (ROOT / "scripts/generators/tiny_model.py").read_text()
        metadata = {"name": "generate", "namespace": self.name}
        apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"generate.py": script}})
        apply(self._pod("generate", ["python3", "/script/generate.py", "/models/tiny-chat"]))
        self.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/generate", "--timeout=300s", timeout=310)

    def run_hub(self):
        """Run hub.py as the Service ``hub``, with the tiny model as some/model."""
        metadata = {"name": "hub", "namespace": self.name}
        script = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"hub.py": (HERE / "hub.py").read_text()},
        }
        service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata,
                   "spec": {"selector": {"app": "hub"}, "ports": [{"port": 8080}]}}  # fmt: skip
        pod = self._pod("hub", ["python3", "/script/hub.py", "/models/tiny-chat"])
        apply(script, service, pod)
        self.kubectl("wait", "--for=condition=Ready", "pod/hub", "--timeout=60s")

    def _pod(self, name, command):
        """Return a restricted pod with the image, the claim ``models`` and the script of the ConfigMap ``name``."""
        pod = yaml.safe_load((HERE / "pod.yaml").read_text())
        pod["metadata"] = {"name": name, "namespace": self.name, "labels": {"app": name}}
        (container,) = pod["spec"]["containers"]
        container |= {"image": f"{REPOSITORY}:{TAG}", "command": command}
        pod["spec"]["volumes"].append({"name": "script", "configMap": {"name": name}})
        return pod

    def delete(self):
        # Delete pods first: Kubernetes checks a namespace with pods again only after their grace period.
        self.kubectl("delete", "deployments,jobs,pods", "--all", "--timeout=300s", timeout=310)
        kubectl("delete", "namespace", self.name, "--wait=true", "--timeout=300s", timeout=310)
        for volume in self.volumes:
            kubectl("delete", "pv", volume, "--wait=false")


def make_writable(path):
    """Let every user write to a folder of the node. kubelet creates it for root, and hostPath ignores fsGroup."""
    folder = {"name": "folder", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    run_once(["chmod", "777", "/folder"], volumes=[folder])


def run_once(command, *, volumes=(), seconds=300):
    """Run ``command`` as root in a pod of the image until it ends. Mounts ``volumes`` at /NAME."""
    name = f"once-{secrets.token_hex(2)}"
    mounts = [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes]
    container = {
        "name": "once", "image": f"{REPOSITORY}:{TAG}", "command": command, "securityContext": {"runAsUser": 0},
        "volumeMounts": mounts,
    }  # fmt: skip
    apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
           "spec": {"restartPolicy": "Never", "containers": [container], "volumes": list(volumes)}})  # fmt: skip
    pod = f"pod/{name}"
    try:
        kubectl(
            "wait", "--for=jsonpath={.status.phase}=Succeeded", pod, "-n=default", f"--timeout={seconds}s",
            timeout=seconds + 10,
        )  # fmt: skip
    except AssertionError as error:
        raise AssertionError(f"{error}\n{kubectl('describe', pod, '-n=default', check=False)}") from None
    finally:
        kubectl("delete", pod, "-n=default", "--wait=false")


VALUES = {
    "config": {
        "model": "/models/tiny-chat", "served-model-name": "tiny", "enforce-eager": True, "max-model-len": 16384,
        # A drain ends with its streams. The limit is for a node whose cores are busy with other work.
        "max-num-seqs": 128, "launch": {"drain_seconds": 1200},
        # The model's weights are random. It would output white space as long as a grammar allows it.
        "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
    },
    "gpus": {"count": 0},
    "resources": {"cpu": "100m", "memory": "3Gi"},
    "image": {"repository": REPOSITORY, "tag": TAG, "pullPolicy": "Always"},
    "models": {"claim": "models"},
    "cache": {"kind": "emptyDir", "size": "1Gi"},
    "rollout": {"startMinutes": 15},
    "env": [
        {"name": "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "value": "1"},  # the model is random, at any length
        # Otherwise vLLM binds the workers of all pods to the node's first core.
        {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
        {"name": "OMP_NUM_THREADS", "value": "1"},
    ],
}  # fmt: skip


def values(**changed):
    """Return the values of a small release, with ``changed`` sections merged key by key."""
    return VALUES | {
        key: VALUES[key] | value if isinstance(value, dict) and isinstance(VALUES.get(key), dict) else value
        for key, value in changed.items()
    }


class Release:
    """A release of the chart in a namespace."""

    def __init__(self, namespace, name=RELEASE):
        self.namespace, self.name = namespace, name

    def helm(self, verb, *words, chart_values=None, check=True):
        return helm(
            verb, self.name, *words, f"-n={self.namespace.name}",
            *(["-f-"] if chart_values is not None else []),
            input=yaml.safe_dump(chart_values) if chart_values is not None else None,
            check=check, timeout=1500,
        )  # fmt: skip

    def upgrade(self, *words, check=True, **changed):
        return self.helm("upgrade", CHART, "--install", *words, chart_values=values(**changed), check=check)

    def wait(self, seconds=400):
        """Wait until all replicas of the newest configuration are ready and no other pod exists, even terminating."""

        def rolled_out():
            deployment = self.namespace.get(f"deployment/{self.name}")
            status, replicas = deployment["status"], deployment["spec"]["replicas"]
            return (
                status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
                and status.get("updatedReplicas", 0) == status.get("availableReplicas", 0) == replicas
                and len(self.namespace.get("pods", "-l", SERVER)["items"]) == replicas
            )

        until(rolled_out, seconds)

    def pods(self):
        """Return the server's pods that are not terminating."""
        items = self.namespace.get("pods", "-l", SERVER)["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def url(self):
        """Return the URL at which this machine reaches the Service."""
        service = self.namespace.get(f"service/{self.name}")["spec"]
        return f"http://{service['clusterIP']}:{service['ports'][0]['port']}"

    def inside(self, pod, script):
        """Run a shell script in the pod and return its stdout."""
        return self.namespace.kubectl("exec", pod, "-c", "vllm", "--", "bash", "-c", script)

    def endpoints(self):
        """Return the names of the pods to which the Service sends requests."""
        slices = self.namespace.get("endpointslices", "-l", f"kubernetes.io/service-name={self.name}")["items"]
        return {
            endpoint["targetRef"]["name"]
            for endpoint_slice in slices
            for endpoint in endpoint_slice["endpoints"] or []
            if endpoint["conditions"]["ready"]
        }


@contextlib.contextmanager
def traffic(url, streams, tokens, key="none"):
    """Send long streams and short requests until the block ends. Yields a dict, filled with the results at the end."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "traffic.py"), url, key, str(streams), str(tokens)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    results = {}
    try:
        assert process.stdout.readline() == "all streams run\n"
        yield results
    finally:
        output, _ = process.communicate("", timeout=300)
        results |= json.loads(output)
        print(f"traffic: {results}")
