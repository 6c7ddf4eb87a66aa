"""What is shipped is what the code says, is as Grafana publishes it, and leads somebody on call to a runbook."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from machine import ROOT
from promtool import program
from stack import BOARDS

from vllm_health import metrics
from vllm_monitoring import __main__ as generator
from vllm_monitoring import boards, rules, thresholds

MONITORING = ROOT / "monitoring"
SHIPPED = thresholds.read()
PANELS = [
    pytest.param(board, panel, id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in boards.panels(board)
    if panel["type"] != "row"
]
ALERTS = sorted({alert.name for group in rules.every_alert(SHIPPED).values() for alert in group})
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/data/grafana/schemas").glob("*.json")}
# Its "anything" (kinds/dashboard/dashboard_kind.cue: options?: _, value?: _) is published as an object.
for kind, field in (("MatcherConfig", "options"), ("DynamicConfigValue", "value")):
    SCHEMAS["dashboard"]["definitions"][kind]["properties"][field] = {}
OURS = {*metrics.GAUGES, *metrics.COUNTERS}
RECORDS = {rule["record"] for group in rules.groups(SHIPPED)["groups"] for rule in group["rules"] if "record" in rule}


@pytest.mark.parametrize("path", generator.generate(SHIPPED))
def test_what_stands_in_monitoring_is_what_the_code_makes(path):
    assert (MONITORING / path).read_text() == generator.generate(SHIPPED)[path], "run `make generate`"


def test_nothing_else_is_shipped():
    found = {str(path.relative_to(MONITORING)) for folder in ("prometheus/rules", "grafana/dashboards")
             for path in (MONITORING / folder).iterdir()}  # fmt: skip
    assert found == {path for path in generator.generate(SHIPPED) if not path.startswith("runbooks")}


def test_prometheus_takes_the_rules():
    subprocess.run([program("promtool"), "check", "rules", MONITORING / generator.RULES], check=True, timeout=60)


# ---- dashboards


def refused(value, name, definition=None):
    """What Grafana's published schema has against it."""
    schema = SCHEMAS[name] | ({"$ref": f"#/definitions/{definition}"} if definition else {})
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(value)]


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_as_grafana_publishes_it(name):
    assert refused(BOARDS[name], "dashboard") == []


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_a_panel_is_as_grafana_publishes_it(board, panel):
    del board
    kind = panel["type"].replace("-", "")
    assert refused(panel["options"], kind, "Options") == []
    if "FieldConfig" in SCHEMAS[kind]["definitions"]:
        assert refused(panel["fieldConfig"]["defaults"].get("custom", {}), kind, "FieldConfig") == []
    for target in panel["targets"]:
        assert refused(target, "prometheus", "Dataquery") == []


def test_the_schemas_refuse_something():
    assert refused(BOARDS["vllm-engine"] | {"titel": "a"}, "dashboard")
    assert refused({"legend": {"showLegend": "yes"}}, "timeseries", "Options")
    assert refused({"expr": 1}, "prometheus", "Dataquery")


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_a_panel_says_what_good_looks_like_in_a_unit_and_leads_on(board, panel):
    assert panel["description"].endswith(".")
    unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"].get("yAxis", {}).get("unit")
    assert unit or panel["type"] in {"table", "state-timeline"}
    for link in panel.get("links", []):
        assert link["title"] in ALERTS
        assert link["url"] == f"{SHIPPED.runbooks}/{link['title']}.md"
    for target in panel["targets"]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert "$namespace" in target["expr"] or "vector(" in target["expr"], target["expr"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    width = panel["gridPos"]["x"] + panel["gridPos"]["w"]
    assert width <= 24
    del board


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_can_be_chosen_from(name):
    variables = {one["name"]: one for one in BOARDS[name]["templating"]["list"]}
    assert list(variables)[:3] == ["datasource", "namespace", "model"]
    for one in variables.values():
        if one["type"] == "query":
            assert (one["includeAll"], one["multi"], one["allValue"]) == (True, True, ".*")
    titles = [panel["title"] for panel in boards.panels(BOARDS[name])]
    assert len(set(titles)) == len(titles)


def test_every_state_has_a_colour():
    from vllm_monitoring.panels import STATES  # noqa: PLC0415

    assert set(STATES) == set(metrics.STATES)


# ---- names


def test_names_of_metrics_are_spelt_in_one_place():
    for path in (MONITORING / "vllm_monitoring").glob("*.py"):
        assert not re.search(r"vllm:\w|vllm_health_|DCGM_FI|http_requests_total|\bkube_", path.read_text()), path


def test_nothing_but_names_comes_from_the_prober():
    for path in (MONITORING / "vllm_monitoring").glob("*.py"):
        imported = re.findall(r"^from (vllm_\w+[\w.]*) import (.+)$", path.read_text(), re.MULTILINE)
        assert {(module, name) for module, name in imported if not module.startswith("vllm_monitoring")} <= {
            ("vllm_health", "metrics")
        }, path


def test_every_query_asks_for_names_that_there_are():
    known = {*OURS, *RECORDS, *(value for value in vars(metrics).values() if isinstance(value, str))}
    known |= {f"{name}_{part}" for name in metrics.HISTOGRAMS for part in ("bucket", "sum", "count")}
    known |= {f"{metrics.PREFIX}process_{name}" for name in ("start_time_seconds", "resident_memory_bytes")}
    text = " ".join(
        query.expr for board in BOARDS.values() for query in boards.queries(board, interval_s=15, step_s=15)
    )
    text += " ".join(rule["expr"] for group in rules.groups(SHIPPED)["groups"] for rule in group["rules"])
    for name in re.findall(r"\b(?:vllm:|vllm_health_|model:|slo:|http_|kube_|DCGM_)[\w:]+", text):
        assert name in known, name


# ---- runbooks


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_runbook(alert):
    text = (MONITORING / f"runbooks/{alert}.md").read_text()
    assert re.findall(r"^#+ (.+)$", text, re.MULTILINE) == [alert, "Meaning", "Impact", "Diagnosis", "Mitigation"]
    assert max(map(len, text.splitlines())) <= 120
    known = {*OURS, *RECORDS, *(f"{metrics.PREFIX}process_{name}" for name in ("start_time_seconds",))}
    for name in re.findall(r"\b(?:vllm_health_|model:|slo:)[\w:]+", text):
        assert name in known, name
    for name in re.findall(r"\bvllm:\w+", text):
        assert re.sub(r"_(bucket|sum|count)$", "", name) in vars(metrics).values() or name in vars(metrics).values(), (
            name
        )
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for title in re.findall(r"vLLM / [\w ]+", text):
        assert any(board["title"] == title.rstrip() or title.startswith(board["title"]) for board in BOARDS.values()), (
            title
        )


def test_a_runbook_has_an_alert():
    found = {path.stem for path in (MONITORING / "runbooks").glob("*.md")} - {"README"}
    assert found == set(ALERTS)


# ---- thresholds of one's own


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("slo: {availabilty: {objective: 0.9}}", "slo: 'availabilty' is not known; did you mean availability?"),
        ("slo: {availability: {objective: 1}}", "objective: 1 is no share between 0 and 1"),
        ("slo: {availability: {objective: 0.9}}", "lets no alert at 14.4 times its budget ever fire"),
        ("slo: {time_to_first_token: {seconds: 2}}", "so it is not known how many were faster; take 1 or 2.5"),
        ("slo: {time_to_first_token: {seconds: soon}}", "'soon' is no number, 0 or more; the shipped value is 2.5"),
        ("slo: {burn: []}", "slo: burn: [] is no list of windows"),
        ("slo: {burn: [{severity: page, rate: 2, long: 1h, short: 5m}]}", "burn: 1: for is missing"),
        ("slo: {burn: [{severity: page, rate: 2, long: 5m, short: 5m, for: 1m}]}", "long 5m and short 5m"),
        ("slo: {burn: [{severity: page, rate: 2, long: 1h, short: 1m, for: 1m}]}", "short is 5m or more"),
        ("alerts: {VLLMKVPresure: {usage: 0.8}}", "did you mean VLLMKVPressure?"),
        ("alerts: {VLLMKVPressure: {share: 0.8}}", "'share' is not known"),
        ("alerts: {VLLMKVPressure: {usage: 90}}", "usage: 90 is no share; 0 to 1"),
        ("alerts: {VLLMKVPressure: {for: 10 minutes}}", "'10 minutes' is no time such as 30s, 15m, 6h or 3d"),
        ("alerts: {VLLMKVPressure: {severity: critical}}", "'critical' is no severity: write page or ticket"),
        ("alerts: {VLLMKVPressure: 0.9}", "0.9 is no mapping; write some of severity, for, usage below it"),
        ("alerts: {VLLMEngineStalled: {within: 0s}}", "within: 0s looks at nothing"),
        ("runbooks: wiki", "'wiki' is no URL"),
        ("- a", "is no mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_mistake_in_thresholds_is_one_line_and_nothing_is_written(tmp_path, given, said):
    (tmp_path / "mine.yaml").write_text(given)
    done = generate("--thresholds", tmp_path / "mine.yaml", "--to", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_thresholds_of_ones_own_change_what_they_name_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "alerts: {VLLMQueueTimeHigh: {seconds: 5}}\nrunbooks: https://wiki.example.com\n"
    )
    done = generate("--thresholds", tmp_path / "mine.yaml", "--to", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    found = {rule["alert"]: rule for group in yaml.safe_load((tmp_path / "out" / generator.RULES).read_text())["groups"]
             for rule in group["rules"] if "alert" in rule}  # fmt: skip
    assert found["VLLMQueueTimeHigh"]["expr"].endswith("> 5")
    assert {rule["annotations"]["runbook_url"].rsplit("/", 1)[0] for rule in found.values()} == {
        "https://wiki.example.com"
    }


def test_what_dashboards_read_is_recorded_whatever_windows_alerts_look_at(tmp_path):
    (tmp_path / "mine.yaml").write_text("slo: {burn: [{severity: page, rate: 2, long: 2h, short: 10m, for: 1m}]}")
    files = generator.generate(thresholds.read(tmp_path / "mine.yaml"))
    recorded = {
        rule.get("record") for group in yaml.safe_load(files[generator.RULES])["groups"] for rule in group["rules"]
    }
    for path, text in files.items():
        if path.endswith(".json"):
            assert set(re.findall(r"\b(?:model|slo):[\w:]+", text)) <= recorded, path


@pytest.mark.parametrize(("words", "said"), [
    (["--thresholds", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    (["--to", "/proc/nowhere"], "name another folder with --to"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_one_line(words, said):
    done = generate(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def generate(*words):
    return subprocess.run(
        [sys.executable, "-m", "vllm_monitoring", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
