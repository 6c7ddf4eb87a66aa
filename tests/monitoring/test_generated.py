"""The shipped files are those that the code generates, fit Grafana's schemas, and link to runbooks."""

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
from stack import DASHBOARDS

from vllm_health import metrics
from vllm_monitoring import __main__ as generator
from vllm_monitoring import dashboard_queries, rules, thresholds

MONITORING = ROOT / "monitoring"
SHIPPED = thresholds.read()
PANELS = [
    pytest.param(dashboard, panel, id=f"{name}: {panel['title']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard_queries.panels(dashboard)
    if panel["type"] != "row"
]
ALERTS = sorted({alert.name for group in rules.every_alert(SHIPPED).values() for alert in group})
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/data/grafana/schemas").glob("*.json")}
# The source allows any value here (kinds/dashboard/dashboard_kind.cue: options?: _, value?: _). The schema says object.
for kind, field in (("MatcherConfig", "options"), ("DynamicConfigValue", "value")):
    SCHEMAS["dashboard"]["definitions"][kind]["properties"][field] = {}
OURS = {*metrics.GAUGES, *metrics.COUNTERS}
RECORDS = {rule["record"] for group in rules.groups(SHIPPED)["groups"] for rule in group["rules"] if "record" in rule}


@pytest.mark.parametrize("path", generator.generate(SHIPPED))
def test_generated_files_are_up_to_date(path):
    assert (MONITORING / path).read_text() == generator.generate(SHIPPED)[path], "run `make generate`"


def test_no_other_files_are_shipped():
    files = {str(path.relative_to(MONITORING)) for folder in ("prometheus/rules", "grafana/dashboards")
             for path in (MONITORING / folder).iterdir()}  # fmt: skip
    assert files == {path for path in generator.generate(SHIPPED) if not path.startswith("runbooks")}


def test_promtool_accepts_the_rules():
    subprocess.run([program("promtool"), "check", "rules", MONITORING / generator.RULES], check=True, timeout=60)


# ---- dashboards


def schema_errors(value, name, definition=None):
    """Return the errors of ``value`` by Grafana's published schema."""
    schema = SCHEMAS[name] | ({"$ref": f"#/definitions/{definition}"} if definition else {})
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(value)]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_fits_grafanas_schema(name):
    assert schema_errors(DASHBOARDS[name], "dashboard") == []


@pytest.mark.parametrize(("dashboard", "panel"), PANELS)
def test_a_panel_fits_grafanas_schema(dashboard, panel):
    del dashboard
    kind = panel["type"].replace("-", "")
    assert schema_errors(panel["options"], kind, "Options") == []
    if "FieldConfig" in SCHEMAS[kind]["definitions"]:
        assert schema_errors(panel["fieldConfig"]["defaults"].get("custom", {}), kind, "FieldConfig") == []
    for target in panel["targets"]:
        assert schema_errors(target, "prometheus", "Dataquery") == []


def test_the_schemas_find_errors():
    assert schema_errors(DASHBOARDS["vllm-engine"] | {"titel": "a"}, "dashboard")
    assert schema_errors({"legend": {"showLegend": "yes"}}, "timeseries", "Options")
    assert schema_errors({"expr": 1}, "prometheus", "Dataquery")


@pytest.mark.parametrize(("dashboard", "panel"), PANELS)
def test_a_panel_has_a_description_and_a_unit(dashboard, panel):
    assert panel["description"].endswith(".")
    unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"].get("yAxis", {}).get("unit")
    assert unit or panel["type"] in {"table", "state-timeline"}
    for target in panel["targets"]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert "$namespace" in target["expr"] or "vector(" in target["expr"], target["expr"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    width = panel["gridPos"]["x"] + panel["gridPos"]["w"]
    assert width <= 24
    del dashboard


@pytest.mark.parametrize(("dashboard", "panel"), PANELS)
def test_a_description_says_what_the_panel_shows_then_what_is_normal(dashboard, panel):
    parts = re.split(r" (Normal|Look when|Runbook): ", panel["description"])
    assert all(part.endswith(".") for part in parts[::2])
    titles = parts[1::2]
    assert titles == [title for title in ("Normal", "Look when", "Runbook") if title in {"Normal", *titles}]
    assert "Runbook" not in titles or parts[-1].removesuffix(".") in ALERTS
    del dashboard


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_has_the_variables(name):
    variables = {variable["name"]: variable for variable in DASHBOARDS[name]["templating"]["list"]}
    assert list(variables)[:3] == ["datasource", "namespace", "model"]
    for variable in variables.values():
        if variable["type"] == "query":
            assert (variable["includeAll"], variable["multi"], variable["allValue"]) == (True, True, ".*")
    titles = [panel["title"] for panel in dashboard_queries.panels(DASHBOARDS[name])]
    assert len(set(titles)) == len(titles)


def test_every_state_has_a_colour():
    from vllm_monitoring.panels import STATES  # noqa: PLC0415

    assert set(STATES) == set(metrics.STATES)


# ---- names


def test_metric_names_are_only_in_metrics_py():
    for path in (MONITORING / "vllm_monitoring").glob("*.py"):
        assert not re.search(r"vllm:\w|vllm_health_|DCGM_FI|http_requests_total|\bkube_", path.read_text()), path


def test_only_metrics_is_imported_from_the_prober():
    for path in (MONITORING / "vllm_monitoring").glob("*.py"):
        imported = re.findall(r"^from (vllm_\w+[\w.]*) import (.+)$", path.read_text(), re.MULTILINE)
        assert {(module, name) for module, name in imported if not module.startswith("vllm_monitoring")} <= {
            ("vllm_health", "metrics")
        }, path


def test_every_query_uses_existing_metrics():
    known = {*OURS, *RECORDS, *(value for value in vars(metrics).values() if isinstance(value, str))}
    known |= {f"{name}_{part}" for name in metrics.HISTOGRAMS for part in ("bucket", "sum", "count")}
    known |= {f"{metrics.PREFIX}process_{name}" for name in ("start_time_seconds", "resident_memory_bytes")}
    text = " ".join(
        query.expr
        for dashboard in DASHBOARDS.values()
        for query in dashboard_queries.queries(dashboard, interval_s=15, step_s=15)
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
    code = "".join(path.read_text() for folder in ("scripts", "healthcheck") for path in (ROOT / folder).rglob("*.py"))
    for line in re.findall(r'\| grep "([^"]+)"', text):
        assert line in code, line
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for title in re.findall(r"vLLM / [\w ]+", text):
        assert any(
            dashboard["title"] == title.rstrip() or title.startswith(dashboard["title"])
            for dashboard in DASHBOARDS.values()
        ), title


def test_a_runbook_has_an_alert():
    names = {path.stem for path in (MONITORING / "runbooks").glob("*.md")} - {"README"}
    assert names == set(ALERTS)


# ---- the user's thresholds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slo: {availabilty: {objective: 0.9}}", "slo: 'availabilty' is not known; did you mean availability?"),
        ("slo: {availability: {objective: 1}}", "objective: 1 is not between 0 and 1"),
        ("slo: {availability: {objective: 0.9}}", "is too low: an alert at 14.4 times its budget can never fire"),
        ("slo: {time_to_first_token: {seconds: 2}}", "so the share of faster requests is unknown; write 1 or 2.5"),
        ("slo: {time_to_first_token: {seconds: soon}}", "'soon' is not a number, 0 or more; the shipped value is 2.5"),
        ("slo: {burn: []}", "slo: burn: [] is not a list of windows"),
        ("slo: {burn: [{severity: page, rate: 2, long: 1h, short: 5m}]}", "burn: 1: for is missing"),
        ("slo: {burn: [{severity: page, rate: 2, long: 5m, short: 5m, for: 1m}]}", "long 5m and short 5m"),
        ("slo: {burn: [{severity: page, rate: 2, long: 1h, short: 1m, for: 1m}]}", "short must be 5m or more"),
        ("alerts: {VLLMKVPresure: {usage: 0.8}}", "did you mean VLLMKVPressure?"),
        ("alerts: {VLLMKVPressure: {share: 0.8}}", "'share' is not known"),
        ("alerts: {VLLMKVPressure: {usage: 90}}", "usage: 90 is not a share; write 0 to 1"),
        ("alerts: {VLLMKVPressure: {for: 10 minutes}}", "'10 minutes' is not a time such as 30s, 15m, 6h or 3d"),
        ("alerts: {VLLMKVPressure: {severity: critical}}", "'critical' is not a severity (page or ticket)"),
        ("alerts: {VLLMKVPressure: 0.9}", "0.9 is not a mapping; write some of severity, for, usage below it"),
        ("alerts: {VLLMEngineStalled: {within: 0s}}", "within: 0s is an empty window"),
        ("runbooks: wiki", "'wiki' is not a URL"),
        ("- a", "is not a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_mistake_in_thresholds_is_one_line_and_nothing_is_written(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    result = generate("--thresholds", tmp_path / "mine.yaml", "--to", tmp_path / "out")
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_thresholds_file_changes_only_what_it_names(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "alerts: {VLLMQueueTimeHigh: {seconds: 5}}\nrunbooks: https://wiki.example.com\n"
    )
    result = generate("--thresholds", tmp_path / "mine.yaml", "--to", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    written = yaml.safe_load((tmp_path / "out" / generator.RULES).read_text())
    alerts = {rule["alert"]: rule for group in written["groups"]
             for rule in group["rules"] if "alert" in rule}  # fmt: skip
    assert alerts["VLLMQueueTimeHigh"]["expr"].endswith("> 5")
    assert {rule["annotations"]["runbook_url"] for rule in alerts.values()} == {
        f"https://wiki.example.com/{name}.md" for name in alerts
    }
    dashboards = [json.loads(path.read_text()) for path in (tmp_path / "out/grafana/dashboards").iterdir()]
    panels = [panel for dashboard in dashboards for panel in dashboard_queries.panels(dashboard)]
    links = {link["url"] for panel in panels for link in panel.get("links", [])}
    assert links
    assert links <= {f"https://wiki.example.com/{name}.md" for name in alerts}
    for panel in panels:
        assert all(f"Runbook: {link['title']}." in panel["description"] for link in panel.get("links", [])), panel


def test_without_an_address_alerts_name_their_runbook_and_nothing_links():
    groups = yaml.safe_load((MONITORING / generator.RULES).read_text())["groups"]
    for name, rule in {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}.items():
        assert rule["annotations"]["runbook"] == f"monitoring/runbooks/{name}.md"
        assert "runbook_url" not in rule["annotations"]
    panels = [panel for dashboard in DASHBOARDS.values() for panel in dashboard_queries.panels(dashboard)]
    assert not [panel["title"] for panel in panels if panel.get("links")]


def test_series_of_dashboards_are_recorded_with_any_alert_windows(tmp_path):
    (tmp_path / "mine.yaml").write_text("slo: {burn: [{severity: page, rate: 2, long: 2h, short: 10m, for: 1m}]}")
    files = generator.generate(thresholds.read(tmp_path / "mine.yaml"))
    recorded = {
        rule.get("record") for group in yaml.safe_load(files[generator.RULES])["groups"] for rule in group["rules"]
    }
    for path, text in files.items():
        if path.endswith(".json"):
            assert set(re.findall(r"\b(?:model|slo):[\w:]+", text)) <= recorded, path


@pytest.mark.parametrize(("arguments", "message"), [
    (["--thresholds", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    (["--to", "/proc/nowhere"], "name another folder with --to"),
])  # fmt: skip
def test_an_unusable_file_is_one_line_on_stderr(arguments, message):
    result = generate(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def generate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vllm_monitoring", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
