"""Generate helm/values.schema.json and the table of values in helm/README.md: ``generators/chart.py [OUT_FOLDER]``.

Sources: helm/values.yaml has names, defaults and one-line descriptions. helm/schema.yaml has rules that a default does
not show. tests/data/schemas has Kubernetes' own types. The keys of ``config`` are those of config.yaml: vLLM's options
from engine/options.json, and the launcher's settings from settings.LauncherSettings.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from vllm_launch.engine.options import options
from vllm_launch.settings.settings import LauncherSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
PUBLISHED = ROOT / "tests/data/schemas/kubernetes.json"
TABLE = "<!-- From here on generated: make generate -->\n"
KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z]+):(?P<value>.*?)(?:  # (?P<comment>.*))?")
HEADING = re.compile(r"# ==== (?P<title>.*)")

Schema = dict[str, Any]

TYPES: dict[type, str] = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
KINDS: dict[str, list[str]] = {
    "int": ["integer", "string"],  # vLLM also accepts text for a number
    "human_int": ["integer", "string"],
    "human_int_or_auto": ["integer", "string"],
    "float": ["number", "string"],
    "flag": ["boolean"],
    "switch": ["boolean"],
    "json": ["object", "array", "string"],
    "json_or_str": ["object", "string"],
    "config": ["object", "string"],
    "device_ids": ["array", "string", "integer"],
}


def rows(text: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield (heading, path of the key, comment) for each key of values.yaml. Items of lists are left out."""
    title, parents = "", []
    for line in text.splitlines():
        if match := HEADING.fullmatch(line):
            title = match["title"]
        if match := KEY.fullmatch(line):
            parents = [*parents[: len(match["indent"]) // 2], match["key"]]
            yield title, tuple(parents), match["comment"] or ""


def schema() -> Schema:
    """Return the contents of values.schema.json."""
    text = (CHART / "values.yaml").read_text()
    values, limits = yaml.safe_load(text), yaml.safe_load((CHART / "schema.yaml").read_text())
    comments = {".".join(path): comment for _, path, comment in rows(text)}
    unknown = sorted(set(limits) - set(comments))
    if unknown:
        raise SystemExit(
            f"helm/schema.yaml: {unknown[0]} is not a key of values.yaml. Delete it, or use the spelling of values.yaml"
        )
    built = _section("", values, limits, comments)
    # Helm adds global if the chart is a dependency of another chart.
    built["properties"] |= {"config": _config(), "global": {"type": "object"}}
    definitions: Schema = {}
    _publish(built, json.loads(PUBLISHED.read_text())["definitions"], definitions)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Values of vllm-launch"}
    return head | _named(built) | {"$defs": dict(sorted(definitions.items()))}


def _section(path: str, values: dict[str, Any], limits: dict[str, Schema], comments: dict[str, str]) -> Schema:
    properties = {}
    for key, value in values.items():
        key_path = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict) and value and key_path != "config":
            properties[key] = _named(_section(key_path, value, limits, comments))
        else:
            properties[key] = {"type": TYPES[type(value)]} | limits.get(key_path, {})
        if comments.get(key_path):
            properties[key]["description"] = comments[key_path]
    return {"type": "object", "properties": properties}


def _named(section: Schema) -> Schema:
    """Return ``section`` without other keys. An impossible constant lets Helm's error show the valid keys."""
    names = ", ".join(section["properties"])
    return section | {"additionalProperties": {"const": f"(no such key; there are {names})"}}


def _config() -> Schema:
    """Return the schema of config.yaml. Names have dashes or underscores. The launcher checks the values in full."""
    properties: Schema = {"model": {"type": "string"}}
    for option in options().values():
        kind: Schema = {"type": KINDS.get(option.kind, ["string", "integer", "number"])}
        if option.nargs == "+" or option.append:
            kind = {"type": [*kind["type"], "array"]}
        elif option.choices and option.kind == "str":
            kind = {"enum": list(option.choices)}
        if option.optional or option.nargs == "?":
            kind = {"anyOf": [kind, {"type": ["null", "boolean"]}]}
        properties[option.dest] = properties[option.dest.replace("_", "-")] = kind
    launch: Schema = {}
    for field, kind in zip(LauncherSettings.__struct_fields__, _launch_kinds(), strict=True):
        launch[field] = launch[field.replace("_", "-")] = kind
    properties["launch"] = _named({"type": "object", "properties": dict(sorted(launch.items()))})
    return {
        "type": "object",
        "description": "config.yaml: every flag of `vllm serve`, and the launcher's own settings below launch:",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": False,
    }


def _launch_kinds() -> list[Schema]:
    """Return the schema of each launcher setting, from its annotation."""
    described = msgspec.json.schema(LauncherSettings)["$defs"]["LauncherSettings"]["properties"]
    return [
        {k: v for k, v in described[field].items() if k != "default"} for field in LauncherSettings.__struct_fields__
    ]


def _publish(node: object, published: Schema, definitions: Schema) -> None:
    """Replace each ``of`` in ``node`` by a reference to a ``published`` Kubernetes type in ``definitions``."""
    if isinstance(node, list):
        for item in node:
            _publish(item, published, definitions)
    if not isinstance(node, dict):
        return
    if "of" in node and isinstance(node["of"], (str, list)):
        name = node.pop("of")
        reference = _reference(name[0] if isinstance(name, list) else name, published, definitions)
        node |= {"items": reference} if isinstance(name, list) else reference
    for value in node.values():
        _publish(value, published, definitions)


def _reference(name: str, published: Schema, definitions: Schema) -> Schema:
    full = next(key for key in published if key.rsplit(".", 1)[-1] == name)

    def add(key: str) -> None:
        short = key.rsplit(".", 1)[-1]
        if short in definitions:
            return
        text = json.dumps(published[key])
        dependencies = re.findall(r'"kubernetes\.json#/definitions/([^"]+)"', text)
        definitions[short] = json.loads(
            re.sub(r'"kubernetes\.json#/definitions/[^"]+\.([A-Za-z0-9]+)"', r'"#/$defs/\1"', text)
        )
        for dependency in dependencies:
            add(dependency)

    add(full)
    return {"$ref": f"#/$defs/{name}"}


def table() -> str:
    """Return every value with its default and comment as Markdown tables, under the headings of values.yaml."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    lines, last_title = [], ""
    for title, path, comment in rows(text):
        value = values
        for key in path:
            value = value[key]
        if title != last_title:
            lines += ["", f"### {title}", "", "| value | default | |", "|---|---|---|"]
            last_title = title
        if isinstance(value, dict) and value:
            lines += [f"| `{'.'.join(path)}` | | {comment} |"] if comment else []
        else:
            lines.append(f"| `{'.'.join(path)}` | `{json.dumps(value)}` | {comment} |")
    return "\n".join(lines).lstrip("\n") + "\n"


def main(out: Path) -> None:
    """Write values.schema.json and README.md into ``out``."""
    head = (CHART / "README.md").read_text().partition(TABLE)[0]
    (out / "values.schema.json").write_text(json.dumps(schema(), separators=(",", ":"), ensure_ascii=False) + "\n")
    (out / "README.md").write_text(f"{head}{TABLE}\n{table()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHART)
