#!/usr/bin/env python3
"""Make tests/data/schemas again, which kubeconform tries the chart with: ``kubernetes_schemas.py [--check]``.

The schemas are the ones that Kubernetes and the operators publish, fetched as Go modules, so that Go's checksums vouch
for them. What is changed makes them as strict as an API server that is asked for strict field validation:

* an object whose properties are listed takes no other, unless it says x-kubernetes-preserve-unknown-fields;
* a kind takes its own apiVersion and spelling alone, and a custom resource the metadata of every Kubernetes object;
* what kubeconform does not know is said in words that it knows: int-or-string, int32, int64, base64, quantities;
* null is refused, although the API server takes it for "not set": a template that leaves a value empty is a mistake.

What no schema can say is not checked: CEL rules (x-kubernetes-validations), keys that are unique in a list, references
between objects, and what Kubernetes checks in code alone for its own kinds: names, ranges, enumerations.

--check writes nothing; exit code 1: what is there is not what these versions publish.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = ("k8s.io/kubernetes", "v1.34.4")
KINDS = {
    "v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "batch/v1": ["Job"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
    "scheduling.k8s.io/v1": ["PriorityClass"],
}
CRDS = {
    ("github.com/prometheus-operator/prometheus-operator", "v0.85.0"): [
        "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
    ],
    ("github.com/kedacore/keda/v2", "v2.21.0"): [
        "config/crd/bases/keda.sh_scaledobjects.yaml",
        "config/crd/bases/keda.sh_triggerauthentications.yaml",
    ],
    ("sigs.k8s.io/gateway-api", "v1.6.3"): [
        "config/crd/standard/gateway.networking.k8s.io_gateways.yaml",
        "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",
    ],
    ("sigs.k8s.io/gateway-api-inference-extension", "v1.6.0"): [
        "config/crd/bases/inference.networking.k8s.io_inferencepools.yaml",
    ],
    ("sigs.k8s.io/lws", "v0.9.0"): [
        "config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml",
    ],
}
OUT = Path(__file__).parents[2] / "tests/data/schemas"

Schema = dict[str, Any]
SHARED = "kubernetes.json"
METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
QUANTITIES = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
"""What CRDs that contain a quantity publish for it; Kubernetes itself publishes that it is a string or a number."""
BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"

KEPT = {
    "enum", "exclusiveMaximum", "exclusiveMinimum", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "multipleOf", "pattern", "required", "type", "uniqueItems",
}  # fmt: skip
PARTS = {"allOf", "anyOf", "not", "oneOf"}
DROPPED = {
    "default", "description", "format", "x-kubernetes-group-version-kind", "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type", "x-kubernetes-map-type", "x-kubernetes-patch-merge-key", "x-kubernetes-patch-strategy",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-unions", "x-kubernetes-validations",
}  # fmt: skip
FORMATS: dict[str, Schema] = {
    "byte": {"pattern": BASE64},
    "date-time": {"format": "date-time"},
    "double": {},
    "int-or-string": {},  # beside it stands oneOf
    "int32": {"minimum": -(1 << 31), "maximum": (1 << 31) - 1},
    "int64": {"minimum": -(1 << 63), "maximum": (1 << 63) - 1},
    "ipv4": {"format": "ipv4"},
    "ipv6": {"format": "ipv6"},
}


def strict(published: Schema, *, crd: bool, whole: bool = True) -> Schema:
    """``published`` in the words of JSON schema, draft 4; a word that is not known here stops the making.

    Below PARTS an object is not ``whole``: only the properties that matter there are listed.
    """
    made = dict(FORMATS[published["format"]]) if "format" in published else {}
    for word, value in published.items():
        made |= spelt(word, value, crd=crd, whole=whole)
    if whole and "properties" in made and not published.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if crd:  # defaults are filled in first; in Kubernetes' own kinds they are zero values, which are not
        properties = published.get("properties", {})
        required = [name for name in made.pop("required", []) if "default" not in properties.get(name, {})]
        made |= {"required": required} if required else {}  # in draft 4 the list must not be empty
    if list(made) == ["allOf"] and len(made["allOf"]) == 1:  # a $ref that had a description beside it
        return dict(made["allOf"][0])
    return made


def spelt(word: str, value: Any, *, crd: bool, whole: bool) -> Schema:
    """What ``word: value`` of a published schema is in JSON schema."""
    below = partial(strict, crd=crd, whole=whole and word not in PARTS)
    if word in DROPPED:
        return {}
    if word == "$ref":
        return {word: reference(value.rpartition("/")[2])}
    if word == "properties":
        return {word: {name: below(schema) for name, schema in value.items()}}
    if word in PARTS | {"items", "additionalProperties"}:
        return {word: [below(schema) for schema in value] if isinstance(value, list) else below(value)}
    if word == "x-kubernetes-int-or-string":
        return {"type": ["integer", "string"]}
    if word not in KEPT:
        raise SystemExit(f"kubernetes_schemas: {word}: {value} is new; what does it ask of a manifest?")
    return {word: value}


def reference(name: str) -> str:
    """Where the definition ``name`` is."""
    return f"{SHARED}#/definitions/{name}"


def kubernetes(folder: Path) -> tuple[dict[str, Schema], dict[str, str], dict[str, Schema]]:
    """The schema of each kind by its file's name, what it was made from, and the definitions that schemas refer to."""
    made: dict[str, Schema] = {}
    origin: dict[str, str] = {}
    definitions: dict[str, Schema] = {}
    for api_version, kinds in KINDS.items():
        group, _, version = api_version.rpartition("/")
        path = f"api/openapi-spec/v3/{'apis' if group else 'api'}__{api_version.replace('/', '__')}_openapi.json"
        schemas = json.loads((folder / path).read_text())["components"]["schemas"]
        definitions |= {name: strict(schema, crd=False) for name, schema in schemas.items()}
        for kind in kinds:
            own = [{"group": group, "kind": kind, "version": version}]
            root = next(s for s in schemas.values() if s.get("x-kubernetes-group-version-kind") == own)
            name = file_name(kind, api_version)
            made[name], origin[name] = of_kind(strict(root, crd=False), kind, api_version), path
    definitions[QUANTITY]["pattern"] = QUANTITIES
    return made, origin, definitions


def custom(text: str) -> tuple[str, Schema]:
    """File name and schema of the version that a CRD stores."""
    crd = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]
    version = next(version for version in crd["versions"] if version["storage"])
    kind, api_version = crd["names"]["kind"], f"{crd['group']}/{version['name']}"
    schema = strict(version["schema"]["openAPIV3Schema"], crd=True)
    if schema["properties"]["metadata"] != {"type": "object"}:
        raise SystemExit(f"kubernetes_schemas: {kind}: its metadata is more than an object's")
    schema["properties"]["metadata"] = {"$ref": reference(METADATA)}
    return file_name(kind, api_version), of_kind(schema, kind, api_version)


def file_name(kind: str, api_version: str) -> str:
    """``{{.ResourceKind}}{{.KindSuffix}}.json`` of kubeconform, which takes only a group's first word."""
    group, _, version = api_version.rpartition("/")
    return "-".join(word.lower() for word in (kind, group.partition(".")[0], version) if word) + ".json"


def of_kind(schema: Schema, kind: str, api_version: str) -> Schema:
    """``schema`` for this kind alone: a file's name says neither the case of a kind nor the rest of a group."""
    words = {"apiVersion": {"enum": [api_version]}, "kind": {"enum": [kind]}}
    required = sorted({*schema.get("required", []), *words})
    return schema | {"properties": schema["properties"] | words, "required": required}


def used(schemas: dict[str, Schema], definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Those ``definitions`` that ``schemas`` lead to."""
    found: dict[str, Schema] = {}
    todo = list(schemas.values())
    while todo:
        for name in references(todo.pop()):
            if name not in found:
                found[name] = definitions[name]
                todo.append(definitions[name])
    return found


def references(schema: Any) -> Iterator[str]:
    """Names of the definitions that stand in ``schema``."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def module(name: str, version: str) -> Path:
    """The folder of a Go module."""
    words = ["go", "mod", "download", "-json", f"{name}@{version}"]
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("kubernetes_schemas: go is not here: https://go.dev/dl") from None
    if done.returncode:
        raise SystemExit(f"kubernetes_schemas: {' '.join(words)}: {done.stdout}{done.stderr}")
    folder = Path(json.loads(done.stdout)["Dir"])
    if "Apache License" not in (folder / "LICENSE").read_text():
        raise SystemExit(f"kubernetes_schemas: {name}: its licence is another, may it be passed on?")
    return folder


def files() -> dict[str, str]:
    """What is in each file. Definitions and sources stand one a line, so that a diff shows which of them moved."""
    schemas, origin, definitions = kubernetes(module(*KUBERNETES))
    sources = {name: (*KUBERNETES, path) for name, path in origin.items()}
    for source, paths in CRDS.items():
        folder = module(*source)
        for path in paths:
            name, schema = custom((folder / path).read_text())
            schemas[name], sources[name] = schema, (*source, path)
    sources[SHARED] = (*KUBERNETES, "api/openapi-spec/v3")
    rows = {
        name: {"module": module_, "version": version, "path": path, "licence": "Apache-2.0"}
        for name, (module_, version, path) in sources.items()
    }
    return {
        **{name: f"{compact(schema)}\n" for name, schema in schemas.items()},
        SHARED: f'{{"definitions":{{\n{lines(used(schemas, definitions))}\n}}}}\n',
        "SOURCES.json": f'{{"made_by":"scripts/generators/{Path(__file__).name}","files":{{\n{lines(rows)}\n}}}}\n',
    }


def lines(table: dict[str, Schema]) -> str:
    """The entries of a JSON object, one a line."""
    return ",\n".join(f"{json.dumps(name)}:{compact(table[name])}" for name in sorted(table))


def compact(value: Any) -> str:
    """JSON without a space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def main(*, check: bool) -> int:
    """Write the files, or say which of them are not as they would be written; the exit code."""
    made = files()
    there = {path.name: path.read_text() for path in OUT.glob("*")}
    moved = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if check:
        for name in moved:
            print(f"{OUT.name}/{name}: not what `make generate` makes")
        return int(bool(moved))
    OUT.mkdir(exist_ok=True)
    for name in moved:
        if name in made:
            (OUT / name).write_text(made[name])
        else:
            (OUT / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
