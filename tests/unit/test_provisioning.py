"""What Grafana is given: keys and values that it reads (data/grafana/provisioning.json), and what compose.yaml has."""

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
    """Grafana tells by the folder what a file is."""
    schema = SCHEMAS[Path(name).parent.as_posix()]
    Draft202012Validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(content)]


@pytest.mark.parametrize("name", FILES)
def test_grafana_knows_every_key_and_reads_every_value(name):
    assert name.endswith((".yaml", ".yml"))  # it reads no others
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
def test_a_mistake_is_seen(mistake):
    name, where, value = MISTAKES[mistake]
    content = copy.deepcopy(read(name))
    *above, key = where.split(".")
    at = content
    for step in above:
        at = at[int(step) if step.isdigit() else step]
    if value is None:
        del at[key]
    else:
        at[key] = value
    (fault,) = faults(name, content)
    assert key in fault


def mounted():
    """Where in Grafana's container each folder of ours is."""
    pairs = [volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"] if volume.startswith(".")]
    return {inside: (ROOT / "compose" / outside).resolve() for outside, inside in pairs}


def test_grafana_is_told_where_these_files_are():
    assert mounted()[SERVICES["grafana"]["environment"]["GF_PATHS_PROVISIONING"]] == PROVISIONING


def test_dashboards_are_looked_for_where_they_are_mounted():
    for provider in read(PROVIDERS)["providers"]:
        assert mounted()[provider["options"]["path"]] == ROOT / "monitoring/grafana/dashboards"


def test_every_source_is_a_service_at_the_port_where_it_listens():
    for source in read(SOURCES)["datasources"]:
        address = urlsplit(source["url"])
        inside = [int(port.rpartition(":")[2]) for port in SERVICES[address.hostname]["ports"]]
        assert address.port in inside


def test_one_source_is_the_default():
    assert [source["isDefault"] for source in read(SOURCES)["datasources"]].count(True) == 1
