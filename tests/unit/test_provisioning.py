"""Grafana's provisioning files agree with its schemas (data/grafana/provisioning.json) and with compose.yaml."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "monitoring/grafana/provisioning"
FILES = sorted(path.relative_to(PROVISIONING).as_posix() for path in PROVISIONING.rglob("*") if path.is_file())
SCHEMAS = json.loads((ROOT / "tests/data/grafana/provisioning.json").read_text())
SERVICES = yaml.safe_load((ROOT / "compose/compose.yaml").read_text())["services"]
SOURCES, PROVIDERS = "datasources/prometheus.yaml", "dashboards/vllm.yaml"


def read(name):
    return yaml.safe_load((PROVISIONING / name).read_text())


def faults(name, content):
    """Return the errors of ``content``. Its folder selects the schema, as in Grafana."""
    schema = SCHEMAS[Path(name).parent.as_posix()]
    Draft202012Validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(content)]


@pytest.mark.parametrize("name", FILES)
def test_each_provisioning_file_fits_grafanas_schema(name):
    assert name.endswith((".yaml", ".yml"))  # Grafana ignores other names
    assert faults(name, read(name)) == []


MISTAKES = {
    "a key of another kind of file": (SOURCES, "providers", []),
    "no version, which means 0": (SOURCES, "apiVersion", None),
    "a version as a string": (PROVIDERS, "apiVersion", "1"),
    "a misspelt key of a source": (SOURCES, "datasources.0.isdefault", True),
    "a bool as a string": (SOURCES, "datasources.0.editable", "no"),
    "an address that has no scheme": (SOURCES, "datasources.0.url", "prometheus:9090"),
    "an access that does not exist": (SOURCES, "datasources.0.access", "server"),
    "a key that is InfluxDB's": (SOURCES, "datasources.0.jsonData.httpMode", "POST"),
    "an interval that has no unit": (SOURCES, "datasources.0.jsonData.timeInterval", "15"),
    "another spelling of allowUiUpdates": (PROVIDERS, "providers.0.allowUIUpdates", True),
    "an organization by name": (PROVIDERS, "providers.0.orgId", "Main Org."),
    "a reader that does not exist": (PROVIDERS, "providers.0.type", "folder"),
    "no path": (PROVIDERS, "providers.0.options.path", None),
    "an option that does not exist": (PROVIDERS, "providers.0.options.recursive", True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schema_finds_each_mistake(mistake):
    name, where, value = MISTAKES[mistake]
    content = copy.deepcopy(read(name))
    *parents, key = where.split(".")
    node = content
    for step in parents:
        node = node[int(step) if step.isdigit() else step]
    if value is None:
        del node[key]
    else:
        node[key] = value
    (fault,) = faults(name, content)
    assert key in fault


def mounted():
    """Return our folders by their paths in Grafana's container."""
    pairs = [volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"] if volume.startswith(".")]
    return {inside: (ROOT / "compose" / outside).resolve() for outside, inside in pairs}


def test_compose_mounts_the_provisioning_folder_where_grafana_reads_it():
    assert mounted()[SERVICES["grafana"]["environment"]["GF_PATHS_PROVISIONING"]] == PROVISIONING


def test_compose_mounts_the_dashboards_where_the_providers_read_them():
    for provider in read(PROVIDERS)["providers"]:
        assert mounted()[provider["options"]["path"]] == ROOT / "monitoring/grafana/dashboards"


def test_every_data_source_is_a_compose_service_with_its_port():
    for source in read(SOURCES)["datasources"]:
        address = urlsplit(source["url"])
        inside = [int(port.rpartition(":")[2]) for port in SERVICES[address.hostname]["ports"]]
        assert address.port in inside


def test_exactly_one_data_source_is_the_default():
    assert [source["isDefault"] for source in read(SOURCES)["datasources"]].count(True) == 1
