"""Every panel has data in the recording of two H100s with two replicas. DCGM's exporter is simulated."""

from __future__ import annotations

import functools

import pytest
from recorded import DCGM, INTERVAL_S, load
from stack import DASHBOARDS

from vllm_health import metrics
from vllm_monitoring import dashboard_queries, draw
from vllm_monitoring.prometheus_query import Window
from vllm_monitoring.prometheus_query import query as query_prometheus

QUERIES = [
    query
    for dashboard in DASHBOARDS.values()
    for query in dashboard_queries.queries(dashboard, interval_s=INTERVAL_S, step_s=INTERVAL_S)
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    prometheus, begin, end = load(tmp_path_factory.mktemp("recorded"), with_dcgm=True)
    yield prometheus, begin, end
    prometheus.close()


def values(recorded, expr):
    prometheus, begin, end = recorded
    return prometheus.values(expr, begin, end, INTERVAL_S)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.dashboard}: {query.panel}: {query.ref}")
def test_a_panel_has_data_on_two_gpus_dcgm_simulated(recorded, query):
    assert values(recorded, query.expr), query.expr


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=lambda dashboard: dashboard["uid"])
def test_a_dashboard_can_be_drawn(recorded, dashboard, tmp_path):
    prometheus, begin, end = recorded
    run_query = functools.partial(query_prometheus, prometheus.url, window := Window(begin, end, INTERVAL_S))
    figure = draw.draw(dashboard, run_query, window)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {panel["title"] for panel in dashboard["panels"] if panel["type"] != "row"} <= texts
    assert "No data" not in texts
    draw.write(figure, tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--from=2", "--to=1"], "--from must be before --to"),
    (["--from=1", "--to=2", "--prometheus=http://127.0.0.1:9"], "http://127.0.0.1:9: no Prometheus answers there"),
    (["--from=1", "--to=2", "nowhere.json"], "nowhere.json: No such file or directory"),
])  # fmt: skip
def test_a_mistake_is_one_line_on_stderr(tmp_path, capsys, arguments, message):
    assert draw.main(["--prometheus=http://127.0.0.1:9", f"--to-folder={tmp_path}", *arguments]) == 2
    assert message in (line := capsys.readouterr().err)
    assert line.count("\n") == 1


def test_some_panel_reads_each_dcgm_metric():
    expressions = " ".join(query.expr for query in QUERIES)
    assert all(name in expressions for name in DCGM)
    assert {value for name, value in vars(metrics).items() if name.startswith("DCGM_")} == set(DCGM)


def test_percent_panels_have_values_between_0_and_1(recorded):
    """The exporter's own unit may differ."""
    for dashboard in DASHBOARDS.values():
        for panel in dashboard_queries.panels(dashboard):
            if panel.get("fieldConfig", {}).get("defaults", {}).get("unit") != "percentunit":
                continue
            for query in dashboard_queries.queries(
                {"uid": "", "panels": [panel]}, interval_s=INTERVAL_S, step_s=INTERVAL_S
            ):
                assert all(0 <= value <= 1.05 for value in values(recorded, query.expr)), (panel["title"], query.expr)
