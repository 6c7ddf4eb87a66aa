"""Panels over GPUs, and over several replicas, against what two H100s showed; DCGM's exporter simulated."""

from __future__ import annotations

import json

import pytest
from machine import ROOT
from recorded import DCGM, INTERVAL_S, load

from vllm_health import metrics
from vllm_monitoring import boards

BOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json"))]
QUERIES = [query for board in BOARDS for query in boards.queries(board, interval_s=INTERVAL_S, step_s=INTERVAL_S)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    prometheus, begin, end = load(tmp_path_factory.mktemp("recorded"), with_dcgm=True)
    yield lambda expr: prometheus.values(expr, begin, end, INTERVAL_S)
    prometheus.close()


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.board}: {query.panel}: {query.ref}")
def test_a_panel_has_data_on_two_gpus_dcgm_simulated(recorded, query):
    assert recorded(query.expr), query.expr


def test_every_name_of_dcgm_is_read_somewhere():
    asked = " ".join(query.expr for query in QUERIES)
    assert all(name in asked for name in DCGM)
    assert {value for name, value in vars(metrics).items() if name.startswith("DCGM_")} == set(DCGM)


def test_shares_are_shares(recorded):
    """What is shown in percent is between 0 and 1, whatever the exporter's own unit."""
    for board in BOARDS:
        for panel in boards.panels(board):
            if panel.get("fieldConfig", {}).get("defaults", {}).get("unit") != "percentunit":
                continue
            for query in boards.queries({"uid": "", "panels": [panel]}, interval_s=INTERVAL_S, step_s=INTERVAL_S):
                assert all(0 <= value <= 1.05 for value in recorded(query.expr)), (panel["title"], query.expr)
