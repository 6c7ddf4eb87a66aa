"""The schemas refuse and accept the same manifests as an API server, at every depth.

``scripts/generators/kubernetes_schemas.py --check`` compares them with the published ones. It needs a network.
"""

from __future__ import annotations

import copy
import json
import runpy

import pytest
import yaml
from kubeconform import MISSING, SCHEMAS, problems
from machine import ROOT

POD = "{containers: [{name: a, image: b, ports: [{containerPort: 80}], resources: {limits: {cpu: 500m}}}]}"
SELECTOR = "{matchLabels: {a: b}}"
TEMPLATE = f"{{metadata: {{labels: {{a: b}}}}, spec: {POD}}}"
REF = "{group: inference.networking.k8s.io, kind: InferencePool, name: a, port: 80}"
RULE = "{alert: A, expr: up == 0, for: 5m, labels: {severity: page}}"

# apiVersion, kind, other fields, path of an object that gets an unknown field, path of a scalar that gets a list
KINDS = [
    ("v1", "ConfigMap", "data: {a: b}", "metadata", "data.a"),
    ("v1", "PersistentVolumeClaim", "spec: {resources: {requests: {storage: 1Gi}}}", "spec.resources", "spec.resources.requests.storage"),
    ("v1", "Pod", f"spec: {POD}", "spec.containers.0.ports.0", "spec.containers.0.image"),
    ("v1", "Secret", "data: {a: Yg==}", "metadata", "data.a"),
    ("v1", "Service", "spec: {ports: [{port: 80, targetPort: http}]}", "spec.ports.0", "spec.ports.0.targetPort"),
    ("v1", "ServiceAccount", "imagePullSecrets: [{name: a}]", "imagePullSecrets.0", "imagePullSecrets.0.name"),
    ("apps/v1", "Deployment", f"spec: {{selector: {SELECTOR}, template: {TEMPLATE}}}", "spec.template.spec.containers.0.resources", "spec.template.spec.containers.0.ports.0.containerPort"),
    ("apps/v1", "StatefulSet", f"spec: {{selector: {SELECTOR}, template: {TEMPLATE}, volumeClaimTemplates: [{{spec: {{volumeName: a}}}}]}}", "spec.volumeClaimTemplates.0.spec", "spec.volumeClaimTemplates.0.spec.volumeName"),
    ("autoscaling/v2", "HorizontalPodAutoscaler", "spec: {maxReplicas: 2, scaleTargetRef: {kind: Deployment, name: a}}", "spec.scaleTargetRef", "spec.maxReplicas"),
    ("batch/v1", "Job", f"spec: {{template: {TEMPLATE}}}", "spec.template.metadata", "spec.template.spec.containers.0.name"),
    ("networking.k8s.io/v1", "Ingress", "spec: {defaultBackend: {service: {name: a, port: {number: 80}}}}", "spec.defaultBackend.service.port", "spec.defaultBackend.service.port.number"),
    ("networking.k8s.io/v1", "NetworkPolicy", f"spec: {{podSelector: {SELECTOR}, ingress: [{{ports: [{{port: http}}]}}]}}", "spec.ingress.0.ports.0", "spec.ingress.0.ports.0.port"),
    ("policy/v1", "PodDisruptionBudget", f"spec: {{selector: {SELECTOR}, maxUnavailable: 1}}", "spec.selector", "spec.maxUnavailable"),
    ("rbac.authorization.k8s.io/v1", "Role", "rules: [{apiGroups: [''], resources: [pods], verbs: [get]}]", "rules.0", "rules.0.verbs.0"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding", "{roleRef: {apiGroup: a, kind: Role, name: a}, subjects: [{kind: User, name: a}]}", "subjects.0", "roleRef.name"),
    ("scheduling.k8s.io/v1", "PriorityClass", "value: 1", "metadata", "value"),
    ("monitoring.coreos.com/v1", "PodMonitor", f"spec: {{selector: {SELECTOR}, podMetricsEndpoints: [{{port: http, interval: 15s}}]}}", "spec.podMetricsEndpoints.0", "spec.podMetricsEndpoints.0.port"),
    ("monitoring.coreos.com/v1", "ServiceMonitor", f"spec: {{selector: {SELECTOR}, endpoints: [{{port: http, interval: 15s}}]}}", "spec.endpoints.0", "spec.endpoints.0.interval"),
    ("monitoring.coreos.com/v1", "PrometheusRule", f"spec: {{groups: [{{name: a, rules: [{RULE}]}}]}}", "spec.groups.0.rules.0", "spec.groups.0.rules.0.labels.severity"),
    ("keda.sh/v1alpha1", "ScaledObject", "spec: {scaleTargetRef: {name: a}, triggers: [{type: prometheus, metadata: {threshold: '1'}}]}", "spec.scaleTargetRef", "spec.triggers.0.metadata.threshold"),
    ("keda.sh/v1alpha1", "TriggerAuthentication", "spec: {secretTargetRef: [{parameter: a, name: b, key: c}]}", "spec.secretTargetRef.0", "spec.secretTargetRef.0.key"),
    ("gateway.networking.k8s.io/v1", "Gateway", "spec: {gatewayClassName: a, listeners: [{name: http, port: 80, protocol: HTTP}]}", "spec.listeners.0", "spec.listeners.0.port"),
    ("gateway.networking.k8s.io/v1", "HTTPRoute", f"spec: {{parentRefs: [{{name: a}}], hostnames: [a.b], rules: [{{backendRefs: [{REF}]}}]}}", "spec.rules.0.backendRefs.0", "spec.rules.0.backendRefs.0.name"),
    ("inference.networking.k8s.io/v1", "InferencePool", f"spec: {{selector: {SELECTOR}, targetPorts: [{{number: 80}}], endpointPickerRef: {{name: a, port: {{number: 90}}}}}}", "spec.endpointPickerRef", "spec.targetPorts.0.number"),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", f"spec: {{leaderWorkerTemplate: {{size: 2, workerTemplate: {TEMPLATE}}}}}", "spec.leaderWorkerTemplate.workerTemplate.spec.containers.0", "spec.leaderWorkerTemplate.workerTemplate.spec.containers.0.resources.limits.cpu"),
]  # fmt: skip
VALID = {
    kind: {"apiVersion": api_version, "kind": kind, "metadata": {"name": "a"}} | yaml.safe_load(rest)
    for api_version, kind, rest, *_ in KINDS
}


def with_value(kind, path, value):
    """Return the problems of the valid manifest of ``kind`` after setting ``value`` at ``path``."""
    manifest = copy.deepcopy(VALID[kind])
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target = manifest
    for key in parents:
        target = target[key]
    target[last] = value
    return problems(yaml.safe_dump(manifest))


def test_valid_manifests_pass():
    assert problems(yaml.safe_dump_all(VALID.values())) == []


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for _, kind, _, path, _ in KINDS])
def test_an_unknown_field_is_refused(kind, path):
    pointer = path.replace(".", "/")
    assert with_value(kind, f"{path}.misspelt", "a") == [
        f"{kind} a: /{pointer}: additional properties 'misspelt' not allowed"
    ]


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for _, kind, _, _, path in KINDS])
def test_a_wrong_type_is_refused(kind, path):
    lines = with_value(kind, path, ["a"])
    assert lines
    assert all(line.startswith(f"{kind} a: /{path.replace('.', '/')}: ") for line in lines)


@pytest.mark.parametrize(
    ("kind", "path", "value", "reason"),
    [
        ("Deployment", "kind", "deployment", "value must be 'Deployment'"),
        ("PodMonitor", "apiVersion", "monitoring.example.com/v1", "value must be 'monitoring.coreos.com/v1'"),
        ("Deployment", "apiVersion", "apps/v2", "could not find schema for Deployment"),
        ("Deployment", "spec", {"selector": {}}, "missing property 'template'"),
        ("Deployment", "metadata.annotations", None, "got null, want object"),
        ("Deployment", "spec.template.spec.containers.0.resources.limits.memory", "16GB", "does not match pattern"),
        ("Service", "spec.ports.0.port", 1 << 31, "maximum"),
        ("Secret", "data.a", "not base64", "does not match pattern"),
        ("PodMonitor", "metadata.labels", {"a": 1}, "got number, want string"),
        ("PodMonitor", "spec.podMetricsEndpoints.0.interval", "15 s", "does not match pattern"),
        ("ScaledObject", "spec.triggers.0.authenticationRef", {"name": "a", "kind": "b"}, "value must be one of"),
        ("HTTPRoute", "spec.hostnames.0", "under_score", "does not match pattern"),
        ("HTTPRoute", "spec.rules.0.backendRefs.0.weight", -1, "minimum"),
        ("InferencePool", "spec.targetPorts", [], "minItems"),
        (
            "LeaderWorkerSet",
            "spec.leaderWorkerTemplate.workerTemplate.spec.containers.0.resources.limits.cpu",
            0.5,
            "got number, want integer or string",
        ),
    ],
)
def test_other_bad_values_are_refused(kind, path, value, reason):
    assert reason in "; ".join(with_value(kind, path, value))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Service", "spec.ports.0.targetPort", 8000),
        ("Deployment", "spec.template.spec.containers.0.resources.limits", {"cpu": 0.5, "nvidia.com/gpu": 1}),
        ("Deployment", "spec.template.metadata.annotations", {"any/name": "a"}),
        ("PodMonitor", "metadata.labels", {"release": "a"}),
        ("LeaderWorkerSet", "spec.rolloutStrategy", {}),  # its required type has a default
        ("Gateway", "spec.addresses", [{"type": "Hostname", "value": "a.b"}]),  # a oneOf of two property lists
    ],
)
def test_valid_values_are_accepted(kind, path, value):
    assert with_value(kind, path, value) == []


def test_a_kind_without_a_schema_and_a_duplicate_key_are_problems():
    service = yaml.safe_dump(VALID["Service"])
    lines = problems(
        f"# Source: a\n---\n{service}---\n{service}metadata: {{}}\n---\n{{apiVersion: a/v1, kind: B, metadata: {{name: c}}}}\n"
    )
    assert len(lines) == 2
    assert lines[0] == "B c: could not find schema for B"
    assert 'key "metadata" already set' in lines[1]


def test_without_kubeconform_a_test_fails_with_the_install_command(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception) as failed:
        problems("")
    assert str(failed.value) == MISSING


def test_each_schema_has_a_case_here_and_the_generators_version():
    sources = json.loads((SCHEMAS / "SOURCES.json").read_text())["files"]
    table = runpy.run_path(str(ROOT / "scripts/generators/kubernetes_schemas.py"))
    versions = {(source["module"], source["version"]) for source in sources.values()}
    assert versions == {table["KUBERNETES"], *table["CRDS"]}
    assert {path.name for path in SCHEMAS.iterdir()} == {"SOURCES.json", *sources}
    tested = {table["file_name"](kind, api_version) for api_version, kind, *_ in KINDS}
    assert set(sources) == {table["SHARED"], *tested}
