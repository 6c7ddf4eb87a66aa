"""Values that the chart refuses before they reach a cluster: by its schema, or by a rule over several values."""

from __future__ import annotations

import pytest
import yaml
from chart import refusal

BY_SCHEMA = [
    ("modle: x", "/modle': value must be '(no such key; there are config, gpus,"),
    ("gpu: {count: 1}", "/gpu': value must be '(no such key"),
    ("gpus: {coutn: 1}", "/gpus/coutn': value must be '(no such key; there are count, resource, runtimeClass)"),
    ("gpus: {count: two}", "/gpus/count': got string, want integer"),
    ("gpus: {count: 1.5}", "/gpus/count': got number, want integer"),
    ("gpus: {count: -1}", "/gpus/count': minimum: got -1, want 0"),
    ("gpus: {count: 17}", "/gpus/count': maximum: got 17, want 16"),
    ("gpus: {resource: gpu}", "/gpus/resource': 'gpu' does not match pattern"),
    ("resources: {memory: 32GB}", "/resources/memory': '32GB' does not match pattern"),
    ("resources: {memory: 0Gi}", "/resources/memory': '0Gi' does not match pattern"),
    ("resources: {shm: 64M}", "/resources/shm': '64M' does not match pattern"),
    ("resources: {cpu: four}", "/resources/cpu': 'four' does not match pattern"),
    ("resources: {limits: {cpu: 1}}", "/resources/limits': value must be '(no such key; there are cpu, memory, shm)"),
    ("image: {repository: ''}", "/image/repository': '' does not match pattern"),
    ("image: {tag: 'a b'}", "/image/tag': 'a b' does not match pattern"),
    ("image: {digest: latest}", "/image/digest': 'latest' does not match pattern"),
    ("image: {pullPolicy: Sometimes}", "/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'"),
    ("image: {pullSecrets: [{name: a}]}", "/image/pullSecrets/0': got object, want string"),
    ("scheduling: {tolerations: [{kee: a}]}", "/scheduling/tolerations/0': additional properties 'kee' not allowed"),
    ("scheduling: {affinity: {nodes: {}}}", "/scheduling/affinity': additional properties 'nodes' not allowed"),
    ("scheduling: {nodeSelector: {a: 1}}", "/scheduling/nodeSelector/a': got number, want string"),
    ("service: {type: ExternalName}", "/service/type': value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
    ("service: {port: 0}", "/service/port': minimum: got 0, want 1"),
    ("service: {port: http}", "/service/port': got string, want integer"),
    ("streamMinutes: 0", "/streamMinutes': minimum: got 0, want 1"),
    ("ingress: {enabled: 'yes'}", "/ingress/enabled': got string, want boolean"),
    ("ingress: {hosts: [a]}", "/ingress/hosts': value must be '(no such key; there are enabled, className, host,"),
    ("httpRoute: {parents: [{namespace: a}]}", "/httpRoute/parents/0': missing property 'name'"),
    ("cache: {kind: hostPath}", "/cache/kind': value must be one of 'claim', 'ephemeral', 'emptyDir'"),
    ("cache: {size: big}", "/cache/size': 'big' does not match pattern"),
    ("cache: {accessMode: RWX}", "/cache/accessMode': value must be one of"),
    ("replicas: -1", "/replicas': minimum: got -1, want 0"),
    ("replicas: '2'", "/replicas': got string, want integer"),
    ("autoscaling: {by: cpu}", "/autoscaling/by': value must be one of 'keda', 'hpa', 'none'"),
    ("autoscaling: {min: 0}", "/autoscaling/min': minimum: got 0, want 1"),
    ("autoscaling: {prometheus: prometheus}", "/autoscaling/prometheus': 'prometheus' does not match pattern"),
    ("rollout: {atOnce: 0}", "/rollout/atOnce': minimum: got 0, want 1"),
    ("rollout: {atOnce: half}", "/rollout/atOnce': 'half' does not match pattern"),
    ("rollout: {startMinutes: 0}", "/rollout/startMinutes': minimum: got 0, want 1"),
    ("apiKeys: {keys: ['a b']}", "/apiKeys/keys/0': 'a b' does not match pattern"),
    ("apiKeys: {keys: secret}", "/apiKeys/keys': got string, want array"),
    ("user: 0", "/user': minimum: got 0, want 1"),
    ("user: nobody", "/user': got string, want null or integer"),
    (
        "networkPolicy: {from: [{podSelectr: {}}]}",
        "/networkPolicy/from/0': additional properties 'podSelectr' not allowed",
    ),
    ("monitoring: {interval: 15}", "/monitoring/interval': got number, want string"),
    ("nameOverride: Llama", "/nameOverride': 'Llama' does not match pattern"),
    ("env: [{value: a}]", "/env/0': missing property 'name'"),
    ("env: {NCCL_DEBUG: INFO}", "/env': got object, want array"),
    ("volumes: [{name: a, emptydir: {}}]", "/volumes/0': additional properties 'emptydir' not allowed"),
    ("volumeMounts: [{name: a}]", "/volumeMounts/0': missing property 'mountPath'"),
    ("config: {max-modle-len: 5}", "/config': additional properties 'max-modle-len' not allowed"),
    ("config: {dtype: floaty}", "/config/dtype': value must be one of 'auto', 'bfloat16'"),
    ("config: {enforce-eager: 'yes'}", "/config/enforce-eager': got string, want boolean"),
    ("config: {max-num-seqs: [1]}", "/config/max-num-seqs': got array, want integer or string"),
    ("config: {launch: {drain: 3}}", "/config/launch/drain': value must be '(no such key; there are allowed-routes,"),
    ("config: {launch: {drain_seconds: -3}}", "/config/launch/drain_seconds': minimum: got -3, want 0"),
    ("config: {launch: {objective: speed}}", "/config/launch/objective': value must be one of 'latency', 'throughput'"),
]


@pytest.mark.parametrize(("values", "message"), BY_SCHEMA, ids=[values for values, _ in BY_SCHEMA])
def test_the_schema_refuses_a_bad_value(values, message):
    line = refusal(yaml.safe_load(values))
    assert line.startswith("- at '")
    assert message in line


BY_RULE = [
    ("config: {model: ''}", "config.model: no model is set; set a name on the Hugging Face hub, or a folder"),
    ("config: {api-key: [a]}", "config.api-key: a secret must not be in a ConfigMap; use apiKeys.keys"),
    ("config: {hf_token: a}", "config.hf_token: a secret must not be in a ConfigMap"),
    ("config: {launch: {api_key_file: /a}}", "config.launch.api_key_file: the chart mounts the keys itself"),
    ("config: {launch: {cache-dir: /a}}", "config.launch.cache-dir: the chart sets the cache folder to /cache; remove"),
    (
        "config: {model: /models/a}",
        "config.model: /models/a is below /models, where nothing is mounted; set models.claim",
    ),
    ("config: {port: 8001}", "config.port: 8001 is also the health port; change config.port"),
    ("env: [{name: LAUNCH_DRAIN_SECONDS, value: '5'}]", "env LAUNCH_DRAIN_SECONDS: the chart computes its probes"),
    ("models: {claim: a, image: b}", "models.image: models.claim is also set, and only one of them can be"),
    ("apiKeys: {existingSecret: a, keys: [b]}", "apiKeys.keys: apiKeys.existingSecret is also set; remove one of them"),
    ("hfToken: {existingSecret: a, token: b}", "hfToken.token: hfToken.existingSecret is also set; remove one of them"),
    ("replicas: 2", "cache.accessMode: a ReadWriteOnce volume works on one node only, and there can be"),
    ("rollout: {spare: true}", "cache.accessMode: a ReadWriteOnce volume works on one node only"),
    ("autoscaling: {by: keda}", "cache.accessMode: a ReadWriteOnce volume works on one node only"),
    ("cache: {kind: emptyDir, existingClaim: a}", "cache.existingClaim: works only with cache.kind: claim, but"),
    ("{config: {model: /a}, download: {enabled: true}}", "download.enabled: /a is not a name on the hub"),
    ("{cache: {kind: emptyDir}, download: {enabled: true}}", "download.enabled: the pods must see the files that"),
    (
        "{autoscaling: {by: hpa, min: 3, max: 2}, cache: {kind: emptyDir}}",
        "autoscaling.max: 2 is less than autoscaling.min, 3; raise it",
    ),
    ("ingress: {enabled: true}", "ingress.host: is missing; set the host name that clients use"),
    ("httpRoute: {enabled: true}", "httpRoute.parents: is empty; set the Gateway"),
    ("inferencePool: {enabled: true}", "inferencePool.picker: is empty; set the name of the endpoint picker's"),
    ("gpus: {count: 0, runtimeClass: nvidia}", "gpus.runtimeClass: gpus.count is 0, so the pods use no GPU; remove"),
]


@pytest.mark.parametrize(("values", "message"), BY_RULE, ids=[values for values, _ in BY_RULE])
def test_a_rule_refuses_bad_values(values, message):
    assert refusal(yaml.safe_load(values)).startswith(message)
