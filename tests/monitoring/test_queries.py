"""Every query of every panel and rule has something to show, from the real engine and prober under a mixed load."""

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
from stack import BOARDS, INTERVAL_S, Prometheus

from vllm_health import metrics
from vllm_monitoring import boards, rules, thresholds

pytestmark = pytest.mark.timeout(900)
HERE = Path(__file__).parent
QUERIES = [
    query for board in BOARDS.values() for query in boards.queries(board, interval_s=INTERVAL_S, step_s=INTERVAL_S)
]
GROUPS = rules.groups(thresholds.read())["groups"]
RECORDS = sorted({rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule})
NAMES = f"{metrics.PREFIX}|vllm:|model:|slo:|http_|kube_|DCGM_"
SELECTOR = re.compile(rf"(?:{NAMES})[\w:]+(?:\{{[^}}]*\}})?")
LOAD_SECONDS = 60

RECORDED = "there is no GPU here: tried against a recording of two H100s in test_gpus.py"
NOT_HERE = {
    "DCGM_": "dcgm-exporter's: tried against its published form in test_gpus.py",
    "kube_": "kube-state-metrics': tried in test_alerts.py",
    metrics.PREFIX + "gpu_": RECORDED,
    metrics.PREFIX + "nvml_up": RECORDED,
    metrics.PREFIX
    + "start_remaining": "what a first start takes is not known beforehand; test_gpus.py has a second one",
    'planned_gpus:sum{namespace=~".*", model_name=~".*"}) > 0': RECORDED,
    'planned_gpus{namespace=~".*", model_name=~".*", pod=~".*"}) > 0': RECORDED,
}


def why_not(expr):
    """Why a query has nothing to show on this machine; None where it must have."""
    return next((why for name, why in NOT_HERE.items() if name in expr), None)


class Watched:
    """What Prometheus has of the engine from its start to the end of a load."""

    def __init__(self, prometheus, run):
        self.prometheus, self.began = prometheus, time.time()
        run.wait_for("vllm-launch: ready")
        words = [run.url, "tiny", str(LOAD_SECONDS), "10", "512", run.key]
        said = subprocess.run(
            [sys.executable, str(HERE / "mixed_load.py"), *words], check=True, capture_output=True, text=True
        ).stdout
        self.became = json.loads(said)
        time.sleep(3 * INTERVAL_S)
        self.ended = time.time()

    def values(self, expr):
        return self.prometheus.values(expr, self.began, self.ended, INTERVAL_S)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("watched")
    run = Serving(folder, tiny_model, max_num_seqs=4, drain_seconds=40)
    prometheus = Prometheus(folder, [("tiny-0", run.port), ("tiny-0", run.health_port)])
    try:
        yield Watched(prometheus, run)
    finally:
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(60)
        prometheus.close()


def test_the_load_was_of_every_kind(watched):
    kinds = {text.split(":")[0] for text in watched.became}
    assert kinds == {"short", "long", "shared", "left", "whole", "wrong"}, watched.became
    assert not any("cut" in text or "failed" in text for text in watched.became), watched.became


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.board}: {query.panel}: {query.ref}")
def test_a_panel_has_data(watched, query):
    found = watched.values(query.expr)
    if why_not(query.expr) is None:
        assert found, query.expr
    else:
        assert not found, f"not empty any more: {query.expr}"


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_has_data(watched, record):
    assert watched.values(record)


SELECTED = sorted({
    found[0] for group in GROUPS for rule in group["rules"] for found in SELECTOR.finditer(rule["expr"])
})  # fmt: skip
WHEN_IT_HAPPENS = {
    f'{metrics.HTTP_REQUESTS}{{status="5xx"}}': "no request has failed",
    f"{metrics.PREFIX}drain_streams": "nobody drains; it is in test_pages.py",
}


@pytest.mark.parametrize("selector", SELECTED)
def test_what_a_rule_selects_is_there(watched, selector):
    found = watched.values(selector)
    if why_not(selector) is None and selector not in WHEN_IT_HAPPENS:
        assert found, selector
    else:
        assert not found, f"not empty any more: {selector}"


def test_names_that_are_not_shown_are_noticed(watched):
    """The pinned engine shows what ALWAYS_SHOWN says; a name that it does not show would be found out here."""
    shown = {one["metric"]["__name__"] for one in watched.prometheus.query('{__name__=~"vllm:.+"}', watched.ended)}
    assert set(metrics.ALWAYS_SHOWN) <= shown
    renamed = shown - {metrics.KV_CACHE_USAGE} | {"vllm:gpu_cache_usage_perc"}
    assert set(metrics.ALWAYS_SHOWN) - renamed == {metrics.KV_CACHE_USAGE}


@pytest.mark.parametrize("histogram", metrics.BUCKETS)
def test_bounds_of_latencies_are_the_engines(watched, histogram):
    found = watched.prometheus.query(f"{histogram}_bucket", watched.ended)
    assert {one["metric"]["le"] for one in found} == {*map(str, metrics.BUCKETS[histogram]), "+Inf"}


def test_nobody_is_told_of_anything(watched):
    """A start and a minute of load are no reason; how fast this machine is under it is another matter."""
    slow = "VLLMTimeToFirstTokenBurn|VLLMTimePerOutputTokenBurn|VLLMQueueTimeHigh"
    assert watched.prometheus.query(f'ALERTS{{alertstate="firing", alertname!~"{slow}"}}', watched.ended) == []
