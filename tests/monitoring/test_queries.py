"""Every query of every panel and rule returns data from the real engine and prober under a mixed load."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import Serving
from stack import DASHBOARDS, INTERVAL_S, Prometheus

from vllm_health import metrics
from vllm_monitoring import dashboard_queries, rules, thresholds

pytestmark = pytest.mark.timeout(900)
HERE = Path(__file__).parent
QUERIES = [
    query
    for dashboard in DASHBOARDS.values()
    for query in dashboard_queries.queries(dashboard, interval_s=INTERVAL_S, step_s=INTERVAL_S)
]
GROUPS = rules.groups(thresholds.read())["groups"]
RECORDS = sorted({rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule})
NAMES = f"{metrics.PREFIX}|vllm:|model:|slo:|http_|kube_|DCGM_"
SELECTOR = re.compile(rf"(?:{NAMES})[\w:]+(?:\{{[^}}]*\}})?")
LOAD_SECONDS = 60

RECORDED = "there is no GPU here: test_gpus.py tests it with a recording of two H100s"
NO_DATA = {
    "DCGM_": "needs dcgm-exporter: test_gpus.py simulates it",
    "kube_": "needs kube-state-metrics: test_alerts.py tests it",
    metrics.PREFIX + "gpu_": RECORDED,
    metrics.PREFIX + "nvml_up": RECORDED,
    metrics.PREFIX + "start_remaining": "unknown during the first start-up: test_gpus.py has a second one",
    'planned_gpus:sum{namespace=~".*", model_name=~".*"}) > 0': RECORDED,
    'planned_gpus{namespace=~".*", model_name=~".*", pod=~".*"}) > 0': RECORDED,
}


def reason_for_no_data(expr):
    """Return why a query has no data on this machine, or None if it must have data."""
    return next((why for name, why in NO_DATA.items() if name in expr), None)


class Watched:
    """Prometheus' data of the engine from its start-up to the end of a load. ``outcomes``: of the load's requests."""

    def __init__(self, prometheus, run):
        self.prometheus, self.began = prometheus, time.time()
        run.wait_for("vllm-launch: ready")
        arguments = [run.url, "tiny", str(LOAD_SECONDS), "10", "512", run.key]
        output = subprocess.run(
            [sys.executable, str(HERE / "mixed_load.py"), *arguments], check=True, capture_output=True, text=True
        ).stdout
        self.outcomes = json.loads(output)
        time.sleep(3 * INTERVAL_S)
        self.ended = time.time()

    def values(self, expr):
        return self.prometheus.values(expr, self.began, self.ended, INTERVAL_S)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("watched")
    home = folder / "home"  # with the phases of an earlier start, the remaining time would be known
    home.mkdir()
    run = Serving(folder, tiny_model, max_num_seqs=4, drain_seconds=40, environ={"HOME": str(home)})
    prometheus = Prometheus(folder, [("tiny-0", run.port), ("tiny-0", run.health_port)])
    try:
        yield Watched(prometheus, run)
    finally:
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(60)
        prometheus.close()


def test_the_load_has_every_kind_of_request(watched):
    kinds = {text.split(":")[0] for text in watched.outcomes}
    assert kinds == {"short", "long", "shared", "left", "whole", "wrong"}, watched.outcomes
    lost = {text: count for text, count in watched.outcomes.items() if "cut" in text or "failed" in text}
    assert not lost


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.dashboard}: {query.panel}: {query.ref}")
def test_a_panel_has_data(watched, query):
    result = watched.values(query.expr)
    if reason_for_no_data(query.expr) is None:
        assert result, query.expr
    else:
        assert not result, f"has data now, remove it from NO_DATA: {query.expr}"


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_has_data(watched, record):
    assert watched.values(record)


SELECTED = sorted({
    match[0] for group in GROUPS for rule in group["rules"] for match in SELECTOR.finditer(rule["expr"])
})  # fmt: skip
NO_DATA_WITHOUT_FAULTS = {
    f'{metrics.HTTP_REQUESTS}{{status="5xx"}}': "no request has failed",
    f"{metrics.PREFIX}drain_streams": "no replica drains: test_pages.py tests it",
}


@pytest.mark.parametrize("selector", SELECTED)
def test_each_selector_of_a_rule_has_data(watched, selector):
    result = watched.values(selector)
    if reason_for_no_data(selector) is None and selector not in NO_DATA_WITHOUT_FAULTS:
        assert result, selector
    else:
        assert not result, f"has data now, remove it from NO_DATA: {selector}"


def test_vllm_shows_every_metric_of_always_shown(watched):
    """The pinned vLLM shows ALWAYS_SHOWN. A renamed metric would fail this test."""
    shown = {
        series["metric"]["__name__"] for series in watched.prometheus.query('{__name__=~"vllm:.+"}', watched.ended)
    }
    assert set(metrics.ALWAYS_SHOWN) <= shown
    renamed = shown - {metrics.KV_CACHE_USAGE} | {"vllm:gpu_cache_usage_perc"}
    assert set(metrics.ALWAYS_SHOWN) - renamed == {metrics.KV_CACHE_USAGE}


@pytest.mark.parametrize("histogram", metrics.BUCKETS)
def test_bucket_bounds_are_those_of_vllm(watched, histogram):
    result = watched.prometheus.query(f"{histogram}_bucket", watched.ended)
    assert {series["metric"]["le"] for series in result} == {*map(str, metrics.BUCKETS[histogram]), "+Inf"}


def test_no_alert_fires(watched):
    """A start-up and a minute of load are normal. Latency alerts are ignored, because this machine may be slow."""
    slow = "VLLMTimeToFirstTokenBurn|VLLMTimePerOutputTokenBurn|VLLMQueueTimeHigh"
    assert watched.prometheus.query(f'ALERTS{{alertstate="firing", alertname!~"{slow}"}}', watched.ended) == []
