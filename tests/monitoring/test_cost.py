"""The cost of 200 replicas for a Prometheus: the overview dashboard of a day, and all rules.

The data is the recording of two replicas, copied.
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from recorded import INTERVAL_S, load, promtool
from stack import DASHBOARDS, Prometheus

from vllm_monitoring import dashboard_queries, rules, thresholds

pytestmark = pytest.mark.timeout(1200)
MODELS, REPLICAS, STEP_S, BLOCK_S = 8, 200, 30, 7200
NAME = re.compile(r"(?:vllm:|vllm_health_|model:)[\w:]+")
AT_ONCE, POINTS = 6, 1000
"""Number of concurrent requests of a browser, and a panel's width in points."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Yield a function that returns the series whose names match a regular expression, with all values."""
    prometheus, begin, end = load(tmp_path_factory.mktemp("recorded"), with_dcgm=False)

    def series(names):
        selector = f'{{__name__=~"{names}"}}'
        return prometheus.ask("query_range", query=selector, start=begin, end=end, step=INTERVAL_S)

    yield series
    prometheus.close()


def prolonged(values, steps, *, counter):
    """Return ``values`` (one per INTERVAL_S) repeated over ``steps`` of STEP_S. A counter continues to increase."""
    recorded = np.asarray(values, float)
    rounds, indexes = np.divmod(np.arange(steps) * STEP_S // INTERVAL_S, len(recorded))
    return recorded[indexes] + (rounds * (recorded[-1] - recorded[0]) if counter else 0)


def copies(labels):
    """Return the labels of a series' copies: one per model, or if it has a pod, one per replica in half of REPLICAS."""
    if "pod" not in labels:
        return [labels | {"model_name": f"m{number}"} for number in range(MODELS)]
    replicas = range(int(labels["pod"][-1]), REPLICAS, 2)
    model = (lambda number: {"model_name": f"m{number % MODELS}"}) if "model_name" in labels else lambda _: {}
    return [labels | model(number) | {"pod": f"r{number}"} for number in replicas]


def multiplied(recorded_series, folder, seconds):
    """Write all copies of the series over ``seconds``. Return the data folder, the end time and the sample count."""
    end = int(time.time()) // BLOCK_S * BLOCK_S
    steps, data, samples = seconds // STEP_S, folder / "data", 0
    blocks = [[] for _ in range(-(-seconds // BLOCK_S))]
    for series in recorded_series:
        name = series["metric"].pop("__name__")
        counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        values = prolonged([value for _, value in series["values"]], steps, counter=counter)
        samples_text = [f" {value:.6g} {end - seconds + step * STEP_S}\n" for step, value in enumerate(values)]
        for labels in copies(series["metric"]):
            samples += steps
            inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
            head = f"{name}{{{inner}}}"
            for number, block in enumerate(blocks):
                first = number * BLOCK_S // STEP_S
                block.append("".join(head + text for text in samples_text[first : first + BLOCK_S // STEP_S]))
    for block in blocks:
        path = folder / "block.om"
        path.write_text("".join(block) + "# EOF\n")
        block.clear()
        promtool("tsdb", "create-blocks-from", "openmetrics", path, data)
    return data, end - STEP_S, samples


def cpu_seconds(prometheus):
    """Return the CPU seconds that a Prometheus has used. Unlike elapsed time, they do not grow with other programs."""
    fields = Path(f"/proc/{prometheus.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_overview_of_200_replicas_over_a_day_takes_less_than_two_seconds(recording, tmp_path):
    day = 24 * 3600
    step = day / POINTS
    queries = list(dashboard_queries.queries(DASHBOARDS["vllm-overview"], interval_s=STEP_S, step_s=step))
    names = {name for query in queries for name in NAME.findall(query.expr)}
    data, at, samples = multiplied(recording("|".join(names)), tmp_path, day)
    prometheus = Prometheus(tmp_path, rules=(), data=data)

    def ask(query):
        began = time.monotonic()
        if query.instant:
            result = prometheus.query(query.expr, at)
        else:
            result = prometheus.ask("query_range", query=query.expr, start=at - day, end=at, step=step)
        return len(result), time.monotonic() - began, query

    try:
        assert prometheus.query("count(vllm_health_state_seconds)", at)[0]["value"][1] == str(REPLICAS)
        cpu_s, began = cpu_seconds(prometheus), time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(ask, queries))
        total_s, cpu_s = time.monotonic() - began, cpu_seconds(prometheus) - cpu_s
    finally:
        prometheus.close()
    _, longest, slowest = max(results, key=lambda result: result[1])
    print(
        f"{len(queries)} queries over {samples:,} samples: {total_s:.2f} s, {cpu_s:.2f} s of CPU; "
        f"the slowest {longest:.2f} s: {slowest.panel}"
    )
    assert not [query.expr for series, _, query in results if not series]
    assert cpu_s < 2 * 2  # two seconds on two cores that nobody else uses


def test_all_rules_over_200_replicas_take_less_than_half_of_their_interval(recording, tmp_path):
    everything = "vllm:.+|vllm_health_.+|http_.+|model:.+|slo:.+"
    data, at, samples = multiplied(recording(everything), tmp_path, 600)
    prometheus = Prometheus(tmp_path, rules=(), data=data)
    seconds_by_rule, before = {}, 0.0
    try:
        assert prometheus.query("count(vllm_health_ready)", at)[0]["value"][1] == str(REPLICAS)
        before = cpu_seconds(prometheus)
        for group in rules.groups(thresholds.read())["groups"]:
            for rule in group["rules"]:
                began = time.monotonic()
                prometheus.query(rule["expr"], at)
                name = rule.get("record") or rule["alert"]
                seconds_by_rule[name] = seconds_by_rule.get(name, 0) + time.monotonic() - began
        cpu_s = cpu_seconds(prometheus) - before
    finally:
        prometheus.close()
    total_s, slowest = sum(seconds_by_rule.values()), max(seconds_by_rule, key=seconds_by_rule.get)
    print(
        f"all rules over {samples:,} samples: {total_s:.2f} s, {cpu_s:.2f} s of CPU; the slowest {seconds_by_rule[slowest]:.2f} s: {slowest}"
    )
    assert cpu_s < 15 / 2  # 15 s is the interval of Compose's Prometheus.
