"""What 200 replicas cost a Prometheus: the Overview of a day, and all rules. The recording of two, multiplied."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from recorded import INTERVAL_S, load, promtool
from stack import BOARDS, Prometheus

from vllm_monitoring import boards, rules, thresholds

pytestmark = pytest.mark.timeout(1200)
MODELS, REPLICAS, STEP_S, BLOCK_S = 8, 200, 30, 7200
NAME = re.compile(r"(?:vllm:|vllm_health_|model:)[\w:]+")
AT_ONCE, POINTS = 6, 1000
"""Requests that a browser has out at a time, and a panel's width in points."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Its series that match, with all their values."""
    prometheus, begin, end = load(tmp_path_factory.mktemp("recorded"), with_dcgm=False)

    def series(names):
        selector = f'{{__name__=~"{names}"}}'
        return prometheus.ask("query_range", query=selector, start=begin, end=end, step=INTERVAL_S)

    yield series
    prometheus.close()


def prolonged(values, steps, *, counter):
    """``values`` (each INTERVAL_S) again and again, as many as ``steps`` of STEP_S; a counter goes on from where it was."""
    every = np.asarray(values, float)
    rounds, place = np.divmod(np.arange(steps) * STEP_S // INTERVAL_S, len(every))
    return every[place] + (rounds * (every[-1] - every[0]) if counter else 0)


def copies(labels):
    """The labels of a series in MODELS models and, where it is of one replica, in its half of REPLICAS."""
    if "pod" not in labels:
        return [labels | {"model_name": f"m{number}"} for number in range(MODELS)]
    replicas = range(int(labels["pod"][-1]), REPLICAS, 2)
    model = (lambda number: {"model_name": f"m{number % MODELS}"}) if "model_name" in labels else lambda _: {}
    return [labels | model(number) | {"pod": f"r{number}"} for number in replicas]


def multiplied(found, folder, seconds):
    """A folder with so many seconds of all copies of what was ``found``; when it ends, and how many samples it has."""
    end = int(time.time()) // BLOCK_S * BLOCK_S
    steps, data, samples = seconds // STEP_S, folder / "data", 0
    blocks = [[] for _ in range(-(-seconds // BLOCK_S))]
    for one in found:
        name = one["metric"].pop("__name__")
        counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        values = prolonged([value for _, value in one["values"]], steps, counter=counter)
        said = [f" {value:.6g} {end - seconds + place * STEP_S}\n" for place, value in enumerate(values)]
        for labels in copies(one["metric"]):
            samples += steps
            inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
            head = f"{name}{{{inner}}}"
            for number, block in enumerate(blocks):
                first = number * BLOCK_S // STEP_S
                block.append("".join(head + text for text in said[first : first + BLOCK_S // STEP_S]))
    for block in blocks:
        path = folder / "block.om"
        path.write_text("".join(block) + "# EOF\n")
        block.clear()
        promtool("tsdb", "create-blocks-from", "openmetrics", path, data)
    return data, end - STEP_S, samples


def test_the_overview_of_a_day_of_200_replicas_answers_in_two_seconds(recording, tmp_path):
    day = 24 * 3600
    step = day / POINTS
    queries = list(boards.queries(BOARDS["vllm-overview"], interval_s=STEP_S, step_s=step))
    names = {name for query in queries for name in NAME.findall(query.expr)}
    data, at, samples = multiplied(recording("|".join(names)), tmp_path, day)
    prometheus = Prometheus(tmp_path, rules=(), data=data)

    def ask(query):
        began = time.monotonic()
        if query.instant:
            found = prometheus.query(query.expr, at)
        else:
            found = prometheus.ask("query_range", query=query.expr, start=at - day, end=at, step=step)
        return len(found), time.monotonic() - began, query

    try:
        assert prometheus.query("count(vllm_health_state_seconds)", at)[0]["value"][1] == str(REPLICAS)
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(ask, queries))
        took = time.monotonic() - began
    finally:
        prometheus.close()
    _, longest, slowest = max(answers, key=lambda answer: answer[1])
    print(
        f"{len(queries)} queries over {samples:,} samples: {took:.2f} s; the slowest {longest:.2f} s: {slowest.panel}"
    )
    assert not [query.expr for series, _, query in answers if not series]
    assert took < 2


def test_all_rules_over_200_replicas_take_a_fraction_of_their_interval(recording, tmp_path):
    everything = "vllm:.+|vllm_health_.+|http_.+|model:.+|slo:.+"
    data, at, samples = multiplied(recording(everything), tmp_path, 600)
    prometheus = Prometheus(tmp_path, rules=(), data=data)
    took = {}
    try:
        assert prometheus.query("count(vllm_health_ready)", at)[0]["value"][1] == str(REPLICAS)
        for group in rules.groups(thresholds.read())["groups"]:
            for rule in group["rules"]:
                began = time.monotonic()
                prometheus.query(rule["expr"], at)
                name = rule.get("record") or rule["alert"]
                took[name] = took.get(name, 0) + time.monotonic() - began
    finally:
        prometheus.close()
    longest = max(took, key=took.get)
    print(
        f"all rules over {samples:,} samples: {sum(took.values()):.2f} s; the slowest {took[longest]:.2f} s: {longest}"
    )
    assert sum(took.values()) < 15 / 2  # the interval of Compose's Prometheus
