"""The tables of docs/performance.md agree with the result files."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
import report  # noqa: E402

from vllm_launch.plan import fit  # noqa: E402


def test_the_pages_tables_equal_the_tables_of_the_results():
    assert report.PAGE.read_text() == report.rendered(report.PAGE.read_text()), "make generate"


def test_a_result_without_a_marker_and_a_marker_without_a_result_are_refused():
    page = report.PAGE.read_text()
    with pytest.raises(SystemExit, match=r"no place for start-h100: <!-- start-h100 -->"):
        report.rendered(page.replace("<!-- start-h100 -->", ""))
    with pytest.raises(SystemExit, match=r"places for start-b200, of which there is no result"):
        report.rendered(f"{page}<!-- start-b200 -->\n<!-- /start-b200 -->\n")


@pytest.mark.parametrize("workload", ["512/256", "4000/500"])
@pytest.mark.parametrize(
    ("result", "default_server", "load"),
    [
        ("throughput-h100-whole-gpu", "no-watermark", "all at once"),
        ("throughput-h100-in-turns", "defaults", "all at once, as in turns"),
    ],
)
def test_the_simulated_gpu_preempts_as_often_as_a_real_gpu(result, default_server, load, workload):
    results = ROOT / "benchmarks/gpu/results"
    real, simulated = (json.loads((results / f"{name}.json").read_text())["rows"] for name in (result, "scheduling"))
    for server, watermark in ((default_server, 0.0), ("plan", fit.WATERMARK)):
        real_row = next(
            row for row in real if (row["configuration"], row["workload"], row["rate"]) == (server, workload, None)
        )
        simulated_row = next(
            row for row in simulated if (row["load"], row["watermark"]) == (f"{workload}, {load}", watermark)
        )
        assert simulated_row["requests"] == real_row["completed"]
        assert simulated_row["kv_tokens"] == real_row["kv_tokens"][0]
        assert simulated_row["preempted"] == pytest.approx(real_row["preemptions"], rel=0.03)


def test_ratios_compare_with_vllms_own_server_at_the_same_rate():
    def row(name, rate, tokens):
        times = {"p50": 1.0, "p99": 2.0}
        return {
            "workload": "w", "configuration": name, "flags": ["--x"], "rate": rate, "requests": 1, "ready_s": 9,
            "output_tok_s": tokens, "ttft_ms": times, "itl_ms": times,
        }  # fmt: skip

    rows = [row("plan", None, 300), row("plan", 4, 110), row("defaults", 4, 100), row("defaults", None, 200)]
    splits = list(report.throughput({"rows": [row("plan-2", 4, 150), row("vllm-tp-2", 4, 100)]}))
    assert [line.split(" | ")[3] for line in splits[2:4]] == ["1.500", "1.000"]
    lines = list(report.throughput({"rows": [*rows, {"configuration": "dead", "error": "no"}]}))
    assert [line.split(" | ")[1:4] for line in lines[2:6]] == [
        ["all at once", "300", "1.500"], ["4", "110", "1.100"], ["4", "100", "1.000"], ["all at once", "200", "1.000"],
    ]  # fmt: skip


def test_a_workload_of_only_one_server_has_no_table():
    times = {"p50": 1.0, "p99": 2.0}
    row = {"configuration": "plan", "flags": [], "rate": None, "requests": 1, "ready_s": 9, "output_tok_s": 100,
           "ttft_ms": times, "itl_ms": times}  # fmt: skip
    lines = list(report.throughput({"rows": [row | {"workload": name} for name in ("a", "a", "b")]}))
    assert [line.split(" | ")[0] for line in lines if "requests/s" in line] == ["| a"]
    assert list(report.throughput({"rows": [row | {"workload": "b"}]}))


def test_preemptions_have_a_column_if_a_row_counts_them():
    times = {"p50": 1.0, "p99": 2.0}
    row = {"workload": "w", "configuration": "plan", "flags": [], "rate": 4, "requests": 1, "ready_s": 9,
           "output_tok_s": 100, "ttft_ms": times, "itl_ms": times}  # fmt: skip
    tables = {name: list(report.throughput({"rows": [{**row, **more}]}))
            for name, more in (("without", {}), ("with", {"preemptions": 7}))}  # fmt: skip
    assert "preemptions" not in tables["without"][0]
    assert tables["with"][0].endswith("| requests | preemptions | ready after s |")
    assert tables["with"][2].endswith("| 1 | 7 | 9 |")


def test_an_error_with_several_lines_is_one_row():
    rows = [{"utilization": 0.99, "survived": False, "error": "Traceback\nOutOfMemoryError: 1 | 2\n", "load": {}}]
    lines = list(report.plain({"rows": rows}))
    assert lines[0] == "| utilization | survived | error |"
    assert lines[2:] == ["| 0.99 | False | OutOfMemoryError: 1 \\| 2 |"]
