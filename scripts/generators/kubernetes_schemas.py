#!/usr/bin/env python3
"""Generate tests/data/schemas, with which kubeconform checks the chart: ``kubernetes_schemas.py [--check]``.

The schemas are those that Kubernetes and the operators publish. They are downloaded as Go modules, so Go verifies their
checksums. The changes make them as strict as an API server with strict field validation:

* An object with listed properties accepts no others, unless it has x-kubernetes-preserve-unknown-fields.
* A kind accepts only its own apiVersion and spelling. A custom resource has the metadata of every Kubernetes object.
* Formats that kubeconform does not know become JSON schema: int-or-string, int32, int64, base64, quantities.
* null is refused, although the API server treats it as "not set", because an empty value is a mistake of a template.

A schema cannot express these rules, so they are not checked: CEL rules (x-kubernetes-validations), unique keys of a
list, references between objects, and rules that Kubernetes has only in code: names, ranges and enumerations of its own
kinds.

--check writes nothing. Exit code 1: the files differ from the published schemas of these versions.
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
"""Pattern of a quantity, as CRDs publish it. Kubernetes itself publishes only that it is a string or a number."""
BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"

UNCHANGED = {
    "enum", "exclusiveMaximum", "exclusiveMinimum", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "multipleOf", "pattern", "required", "type", "uniqueItems",
}  # fmt: skip
SUBSCHEMAS = {"allOf", "anyOf", "not", "oneOf"}
DROPPED = {
    "default", "description", "format", "x-kubernetes-group-version-kind", "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type", "x-kubernetes-map-type", "x-kubernetes-patch-merge-key", "x-kubernetes-patch-strategy",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-unions", "x-kubernetes-validations",
}  # fmt: skip
FORMATS: dict[str, Schema] = {
    "byte": {"pattern": BASE64},
    "date-time": {"format": "date-time"},
    "double": {},
    "int-or-string": {},  # the schema also has oneOf
    "int32": {"minimum": -(1 << 31), "maximum": (1 << 31) - 1},
    "int64": {"minimum": -(1 << 63), "maximum": (1 << 63) - 1},
    "ipv4": {"format": "ipv4"},
    "ipv6": {"format": "ipv6"},
}


def strict(published: Schema, *, crd: bool, whole: bool = True) -> Schema:
    """Return ``published`` as JSON schema, draft 4. An unknown keyword stops the script.

    Below SUBSCHEMAS an object is not ``whole``: it lists only some of its properties, so others stay allowed.
    """
    converted = dict(FORMATS[published["format"]]) if "format" in published else {}
    for word, value in published.items():
        converted |= converted_keyword(word, value, crd=crd, whole=whole)
    if whole and "properties" in converted and not published.get("x-kubernetes-preserve-unknown-fields"):
        converted["additionalProperties"] = False
    if crd:  # the API server fills in a CRD's defaults before it validates, but not those of Kubernetes' own kinds
        properties = published.get("properties", {})
        required = [name for name in converted.pop("required", []) if "default" not in properties.get(name, {})]
        converted |= {"required": required} if required else {}  # draft 4 does not allow an empty list
    if list(converted) == ["allOf"] and len(converted["allOf"]) == 1:  # a $ref with a description
        return dict(converted["allOf"][0])
    return converted


def converted_keyword(word: str, value: Any, *, crd: bool, whole: bool) -> Schema:
    """Return ``word: value`` of a published schema as JSON schema."""
    nested = partial(strict, crd=crd, whole=whole and word not in SUBSCHEMAS)
    if word in DROPPED:
        return {}
    if word == "$ref":
        return {word: reference(value.rpartition("/")[2])}
    if word == "properties":
        return {word: {name: nested(schema) for name, schema in value.items()}}
    if word in SUBSCHEMAS | {"items", "additionalProperties"}:
        return {word: [nested(schema) for schema in value] if isinstance(value, list) else nested(value)}
    if word == "x-kubernetes-int-or-string":
        return {"type": ["integer", "string"]}
    if word not in UNCHANGED:
        raise SystemExit(
            f"kubernetes_schemas: keyword {word}: {value} is unknown. Add it to UNCHANGED, DROPPED or FORMATS"
        )
    return {word: value}


def reference(name: str) -> str:
    """Return the reference to the definition ``name``."""
    return f"{SHARED}#/definitions/{name}"


def kubernetes(folder: Path) -> tuple[dict[str, Schema], dict[str, str], dict[str, Schema]]:
    """Return schemas by file name, their source paths by file name, and the definitions that schemas refer to."""
    by_file: dict[str, Schema] = {}
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
            by_file[name], origin[name] = of_kind(strict(root, crd=False), kind, api_version), path
    definitions[QUANTITY]["pattern"] = QUANTITIES
    return by_file, origin, definitions


def custom(text: str) -> tuple[str, Schema]:
    """Return the file name and the schema of the version that a CRD stores."""
    crd = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]
    version = next(version for version in crd["versions"] if version["storage"])
    kind, api_version = crd["names"]["kind"], f"{crd['group']}/{version['name']}"
    schema = strict(version["schema"]["openAPIV3Schema"], crd=True)
    if schema["properties"]["metadata"] != {"type": "object"}:
        raise SystemExit(f"kubernetes_schemas: {kind}: its metadata has rules of its own. Keep them in custom()")
    schema["properties"]["metadata"] = {"$ref": reference(METADATA)}
    return file_name(kind, api_version), of_kind(schema, kind, api_version)


def file_name(kind: str, api_version: str) -> str:
    """Return kubeconform's ``{{.ResourceKind}}{{.KindSuffix}}.json``, which has only the first word of the group."""
    group, _, version = api_version.rpartition("/")
    return "-".join(word.lower() for word in (kind, group.partition(".")[0], version) if word) + ".json"


def of_kind(schema: Schema, kind: str, api_version: str) -> Schema:
    """Return ``schema`` with this exact kind and apiVersion, which the file name does not show in full."""
    words = {"apiVersion": {"enum": [api_version]}, "kind": {"enum": [kind]}}
    required = sorted({*schema.get("required", []), *words})
    return schema | {"properties": schema["properties"] | words, "required": required}


def used(schemas: dict[str, Schema], definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Return the ``definitions`` that ``schemas`` refer to, directly or through others."""
    needed: dict[str, Schema] = {}
    todo = list(schemas.values())
    while todo:
        for name in references(todo.pop()):
            if name not in needed:
                needed[name] = definitions[name]
                todo.append(definitions[name])
    return needed


def references(schema: Any) -> Iterator[str]:
    """Yield the names of the definitions that ``schema`` refers to."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def module(name: str, version: str) -> Path:
    """Download a Go module and return its folder."""
    words = ["go", "mod", "download", "-json", f"{name}@{version}"]
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("kubernetes_schemas: go is not installed: https://go.dev/dl") from None
    if done.returncode:
        raise SystemExit(f"kubernetes_schemas: {' '.join(words)}: {done.stdout}{done.stderr}")
    folder = Path(json.loads(done.stdout)["Dir"])
    if "Apache License" not in (folder / "LICENSE").read_text():
        raise SystemExit(
            f"kubernetes_schemas: {name}: its licence is not Apache-2.0. Check whether we may redistribute it"
        )
    return folder


def files() -> dict[str, str]:
    """Return the text of each file by name. Each definition and source has its own line, for readable diffs."""
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
    """Return the entries of a JSON object, one per line."""
    return ",\n".join(f"{json.dumps(name)}:{compact(table[name])}" for name in sorted(table))


def compact(value: Any) -> str:
    """Return ``value`` as JSON without spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def main(*, check: bool) -> int:
    """Write the files, or with ``check`` print which files differ. Return the exit code."""
    generated = files()
    current = {path.name: path.read_text() for path in OUT.glob("*")}
    changed = sorted(name for name in generated.keys() | current.keys() if generated.get(name) != current.get(name))
    if check:
        for name in changed:
            print(f"{OUT.name}/{name}: differs from the generated file. Run `make schemas`")
        return int(bool(changed))
    OUT.mkdir(exist_ok=True)
    for name in changed:
        if name in generated:
            (OUT / name).write_text(generated[name])
        else:
            (OUT / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
