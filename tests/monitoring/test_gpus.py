"""Panels over GPUs, and over several replicas, against what two H100s showed; DCGM's exporter simulated."""

from __future__ import annotations

import functools

import pytest
from recorded import DCGM, INTERVAL_S, load
from stack import BOARDS

from vllm_health import metrics
from vllm_monitoring import boards, draw
from vllm_monitoring.answers import Window, asked

QUERIES = [
    query for board in BOARDS.values() for query in boards.queries(board, interval_s=INTERVAL_S, step_s=INTERVAL_S)
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    prometheus, begin, end = load(tmp_path_factory.mktemp("recorded"), with_dcgm=True)
    yield prometheus, begin, end
    prometheus.close()


def values(recorded, expr):
    prometheus, begin, end = recorded
    return prometheus.values(expr, begin, end, INTERVAL_S)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.board}: {query.panel}: {query.ref}")
def test_a_panel_has_data_on_two_gpus_dcgm_simulated(recorded, query):
    assert values(recorded, query.expr), query.expr


@pytest.mark.parametrize("board", BOARDS.values(), ids=lambda board: board["uid"])
def test_a_dashboard_can_be_drawn(recorded, board, tmp_path):
    prometheus, begin, end = recorded
    ask = functools.partial(asked, prometheus.url, window := Window(begin, end, INTERVAL_S))
    figure = draw.draw(board, ask, window)
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {panel["title"] for panel in board["panels"] if panel["type"] != "row"} <= said
    assert "No data" not in said
    draw.write(figure, tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "said"), [
    (["--from=2", "--to=1"], "--from must be before --to"),
    (["--from=1", "--to=2", "--prometheus=http://127.0.0.1:9"], "http://127.0.0.1:9: no Prometheus answers there"),
    (["--from=1", "--to=2", "nowhere.json"], "nowhere.json: No such file or directory"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, words, said):
    assert draw.main(["--prometheus=http://127.0.0.1:9", f"--to-folder={tmp_path}", *words]) == 2
    assert said in (line := capsys.readouterr().err)
    assert line.count("\n") == 1


def test_every_name_of_dcgm_is_read_somewhere():
    asked = " ".join(query.expr for query in QUERIES)
    assert all(name in asked for name in DCGM)
    assert {value for name, value in vars(metrics).items() if name.startswith("DCGM_")} == set(DCGM)


def test_shares_are_shares(recorded):
    """What is shown in percent is between 0 and 1, whatever the exporter's own unit."""
    for board in BOARDS.values():
        for panel in boards.panels(board):
            if panel.get("fieldConfig", {}).get("defaults", {}).get("unit") != "percentunit":
                continue
            for query in boards.queries({"uid": "", "panels": [panel]}, interval_s=INTERVAL_S, step_s=INTERVAL_S):
                assert all(0 <= value <= 1.05 for value in values(recorded, query.expr)), (panel["title"], query.expr)
