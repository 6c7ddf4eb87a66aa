"""docs/performance.md says what was measured, and nothing else."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
import report  # noqa: E402

from vllm_launch.plan import fit  # noqa: E402


def test_the_tables_are_those_of_the_results():
    assert report.PAGE.read_text() == report.rendered(report.PAGE.read_text()), "make generate"


def test_a_result_without_a_place_and_a_place_without_a_result_are_refused():
    page = report.PAGE.read_text()
    with pytest.raises(SystemExit, match=r"no place for start-h100: <!-- start-h100 -->"):
        report.rendered(page.replace("<!-- start-h100 -->", ""))
    with pytest.raises(SystemExit, match=r"places for start-b200, of which there is no result"):
        report.rendered(f"{page}<!-- start-b200 -->\n<!-- /start-b200 -->\n")


@pytest.mark.parametrize("workload", ["512/256", "4000/500"])
@pytest.mark.parametrize(
    ("result", "without", "load"),
    [
        ("throughput-h100-whole-gpu", "no-watermark", "all at once"),
        ("throughput-h100-in-turns", "defaults", "all at once, as in turns"),
    ],
)
def test_the_simulated_gpu_puts_requests_out_as_often_as_a_real_one_did(result, without, load, workload):
    results = ROOT / "benchmarks/gpu/results"
    real, simulated = (json.loads((results / f"{name}.json").read_text())["rows"] for name in (result, "scheduling"))
    for server, watermark in ((without, 0.0), ("plan", fit.WATERMARK)):
        seen = next(
            row for row in real if (row["configuration"], row["workload"], row["rate"]) == (server, workload, None)
        )
        said = next(row for row in simulated if (row["load"], row["watermark"]) == (f"{workload}, {load}", watermark))
        assert said["requests"] == seen["completed"]
        assert said["kv_tokens"] == seen["kv_tokens"][0]
        assert said["preempted"] == pytest.approx(seen["preemptions"], rel=0.03)


def test_ratios_are_to_vllms_own_server_at_the_same_rate():
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


def test_a_workload_that_one_server_alone_came_to_compares_nothing_and_has_no_table():
    times = {"p50": 1.0, "p99": 2.0}
    row = {"configuration": "plan", "flags": [], "rate": None, "requests": 1, "ready_s": 9, "output_tok_s": 100,
           "ttft_ms": times, "itl_ms": times}  # fmt: skip
    lines = list(report.throughput({"rows": [row | {"workload": name} for name in ("a", "a", "b")]}))
    assert [line.split(" | ")[0] for line in lines if "requests/s" in line] == ["| a"]
    assert list(report.throughput({"rows": [row | {"workload": "b"}]}))


def test_preemptions_have_a_column_where_they_were_counted():
    times = {"p50": 1.0, "p99": 2.0}
    row = {"workload": "w", "configuration": "plan", "flags": [], "rate": 4, "requests": 1, "ready_s": 9,
           "output_tok_s": 100, "ttft_ms": times, "itl_ms": times}  # fmt: skip
    told = {name: list(report.throughput({"rows": [{**row, **more}]}))
            for name, more in (("without", {}), ("with", {"preemptions": 7}))}  # fmt: skip
    assert "preemptions" not in told["without"][0]
    assert told["with"][0].endswith("| requests | preemptions | ready after s |")
    assert told["with"][2].endswith("| 1 | 7 | 9 |")


def test_an_error_of_many_lines_stays_one_row():
    rows = [{"utilization": 0.99, "survived": False, "error": "Traceback\nOutOfMemoryError: 1 | 2\n", "load": {}}]
    lines = list(report.plain({"rows": rows}))
    assert lines[0] == "| utilization | survived | error |"
    assert lines[2:] == ["| 0.99 | False | OutOfMemoryError: 1 \\| 2 |"]
