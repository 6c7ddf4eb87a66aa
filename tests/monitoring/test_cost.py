"""What the Overview costs a Prometheus that has a day of 200 replicas: the recording of two, multiplied."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from machine import ROOT
from recorded import INTERVAL_S, load, promtool
from stack import Prometheus

from vllm_monitoring import boards

pytestmark = pytest.mark.timeout(1200)
BOARD = json.loads((ROOT / "monitoring/grafana/dashboards/vllm-overview.json").read_text())
MODELS, REPLICAS, HOURS, STEP_S = 8, 200, 24, 30
NAME = re.compile(r"(?:vllm:|vllm_health_|model:)[\w:]+")
AT_ONCE, POINTS = 6, 1000
"""Requests that a browser has out at a time, and a panel's width in points."""
COUNTERS = ("_total",)


def long_run(values, steps, *, counter):
    """``values`` (each INTERVAL_S) again and again, as many as ``steps`` of STEP_S; a counter goes on from where it was."""
    every = np.asarray(values, float)
    shown = np.arange(steps) * STEP_S // INTERVAL_S
    rounds, place = np.divmod(shown, len(every))
    return every[place] + (rounds * (every[-1] - every[0]) if counter else 0)


def multiplied(folder):
    """A folder with a day of blocks: as many replicas of as many models, each a day of one of the two recorded."""
    prometheus, begin, end = load(folder, with_dcgm=False)
    names = {
        name for query in boards.queries(BOARD, interval_s=STEP_S, step_s=STEP_S) for name in NAME.findall(query.expr)
    }
    found = [
        one
        for name in sorted(names)
        for one in prometheus.ask("query_range", query=name, start=begin, end=end, step=INTERVAL_S)
    ]
    prometheus.close()
    now = int(time.time()) // 7200 * 7200
    steps, per_block = HOURS * 3600 // STEP_S, 7200 // STEP_S
    lines = [[] for _ in range(HOURS // 2)]
    samples = 0
    for one in found:
        labels = one["metric"]
        name = labels["__name__"]
        values = long_run([value for _, value in one["values"]], steps, counter=name.endswith(COUNTERS))
        own = {
            label: value
            for label, value in labels.items()
            if label not in ("__name__", "pod", "model_name", "instance")
        }
        if "pod" in labels:
            mine = int(labels["pod"][-1])
            copies = [(f"m{it % MODELS}", f"r{it}") for it in range(REPLICAS) if it % 2 == mine]
        else:
            copies = [(f"m{it}", None) for it in range(MODELS)]
        for model, pod in copies:
            inner = ",".join(
                f'{it}="{value}"' for it, value in (own | {"model_name": model} | ({"pod": pod} if pod else {})).items()
            )
            for block, out in enumerate(lines):
                first = block * per_block
                at = now - HOURS * 3600 + first * STEP_S
                out.append("".join(
                    f"{name}{{{inner}}} {value:.6g} {at + place * STEP_S}\n"
                    for place, value in enumerate(values[first : first + per_block])
                ))  # fmt: skip
            samples += steps
    data = folder / "day"
    for block, out in enumerate(lines):
        path = folder / f"{block}.om"
        with path.open("w") as file:
            file.writelines(out)
            file.write("# EOF\n")
        out.clear()
        promtool("tsdb", "create-blocks-from", "openmetrics", path, data)
        path.unlink()
    return data, now, samples


def test_the_overview_of_a_day_of_200_replicas_answers_in_two_seconds(tmp_path):
    data, now, samples = multiplied(tmp_path)
    step = HOURS * 3600 / POINTS
    prometheus = Prometheus(tmp_path, rules=False, data=data)
    at = now - STEP_S
    replicas = prometheus.query("count(vllm_health_state_seconds)", at)
    assert float(replicas[0]["value"][1]) == REPLICAS

    def ask(query):
        began = time.monotonic()
        if query.instant:
            found = prometheus.query(query.expr, at)
        else:
            found = prometheus.ask("query_range", query=query.expr, start=at - HOURS * 3600, end=at, step=step)
        return len(found), time.monotonic() - began, query

    queries = list(boards.queries(BOARD, interval_s=STEP_S, step_s=step))
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, queries))
    took = time.monotonic() - began
    prometheus.close()
    slowest = max(answers, key=lambda answer: answer[1])
    print(
        f"{len(queries)} queries over {samples:,} samples: {took:.2f} s; the slowest {slowest[1]:.2f} s: {slowest[2].panel}"
    )
    assert all(series for series, _, query in answers if "ALERTS" not in query.expr), [
        query.expr for series, _, query in answers if not series
    ]
    assert took < 2
