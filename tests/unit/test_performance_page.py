"""The tables of docs/performance.md come from the result files of benchmarks/gpu."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
import report  # noqa: E402

from vllm_launch.plan import fit  # noqa: E402


def test_the_page_has_the_tables_that_the_results_give():
    assert report.PAGE.read_text() == report.render(report.PAGE.read_text()), "make generate"


def test_render_refuses_a_result_without_a_place_and_a_place_without_a_result():
    page = report.PAGE.read_text()
    with pytest.raises(SystemExit, match=r"no place for start-h100: add <!-- start-h100 -->"):
        report.render(page.replace("<!-- start-h100 -->", ""))
    with pytest.raises(SystemExit, match=r"places for start-b200, but no result file"):
        report.render(f"{page}<!-- start-b200 -->\n<!-- /start-b200 -->\n")


@pytest.mark.parametrize("workload", ["512/256", "4000/500"])
@pytest.mark.parametrize(
    ("result", "baseline", "load"),
    [
        ("throughput-h100-whole-gpu", "no-watermark", "all at once"),
        ("throughput-h100-in-turns", "defaults", "all at once, as in turns"),
    ],
)
def test_the_simulated_gpu_has_as_many_preemptions_as_a_real_one(result, baseline, load, workload):
    results = ROOT / "benchmarks/gpu/results"
    real, simulated = (json.loads((results / f"{name}.json").read_text())["rows"] for name in (result, "scheduling"))
    for server, watermark in ((baseline, 0.0), ("plan", fit.WATERMARK)):
        measured = next(
            row for row in real if (row["configuration"], row["workload"], row["rate"]) == (server, workload, None)
        )
        prediction = next(
            row for row in simulated if (row["load"], row["watermark"]) == (f"{workload}, {load}", watermark)
        )
        assert prediction["requests"] == measured["completed"]
        assert prediction["kv_tokens"] == measured["kv_tokens"][0]
        assert prediction["preempted"] == pytest.approx(measured["preemptions"], rel=0.03)


def test_a_ratio_compares_with_vllms_own_server_at_the_same_rate():
    def row(name, rate, tokens):
        times = {"p50": 1.0, "p99": 2.0}
        return {
            "workload": "w", "configuration": name, "flags": ["--x"], "rate": rate, "requests": 1, "ready_s": 9,
            "output_tok_s": tokens, "ttft_ms": times, "itl_ms": times,
        }  # fmt: skip

    rows = [row("plan", None, 300), row("plan", 4, 110), row("defaults", 4, 100), row("defaults", None, 200)]
    splits = list(report.throughput_table({"rows": [row("plan-2", 4, 150), row("vllm-tp-2", 4, 100)]}))
    assert [line.split(" | ")[3] for line in splits[2:4]] == ["1.500", "1.000"]
    lines = list(report.throughput_table({"rows": [*rows, {"configuration": "dead", "error": "no"}]}))
    assert [line.split(" | ")[1:4] for line in lines[2:6]] == [
        ["all at once", "300", "1.500"], ["4", "110", "1.100"], ["4", "100", "1.000"], ["all at once", "200", "1.000"],
    ]  # fmt: skip


def test_a_workload_with_one_row_has_no_table_if_others_have_several():
    times = {"p50": 1.0, "p99": 2.0}
    row = {"configuration": "plan", "flags": [], "rate": None, "requests": 1, "ready_s": 9, "output_tok_s": 100,
           "ttft_ms": times, "itl_ms": times}  # fmt: skip
    lines = list(report.throughput_table({"rows": [row | {"workload": name} for name in ("a", "a", "b")]}))
    assert [line.split(" | ")[0] for line in lines if "requests/s" in line] == ["| a"]
    assert list(report.throughput_table({"rows": [row | {"workload": "b"}]}))


def test_preemptions_have_a_column_if_a_row_has_them():
    times = {"p50": 1.0, "p99": 2.0}
    row = {"workload": "w", "configuration": "plan", "flags": [], "rate": 4, "requests": 1, "ready_s": 9,
           "output_tok_s": 100, "ttft_ms": times, "itl_ms": times}  # fmt: skip
    tables = {name: list(report.throughput_table({"rows": [{**row, **more}]}))
            for name, more in (("without", {}), ("with", {"preemptions": 7}))}  # fmt: skip
    assert "preemptions" not in tables["without"][0]
    assert tables["with"][0].endswith("| requests | preemptions | ready after s |")
    assert tables["with"][2].endswith("| 1 | 7 | 9 |")


def test_an_error_of_several_lines_is_one_row():
    rows = [{"utilization": 0.99, "survived": False, "error": "Traceback\nOutOfMemoryError: 1 | 2\n", "load": {}}]
    lines = list(report.plain_table({"rows": rows}))
    assert lines[0] == "| utilization | survived | error |"
    assert lines[2:] == ["| 0.99 | False | OutOfMemoryError: 1 \\| 2 |"]
