"""vLLM's metrics that we read are in a recorded /metrics of the pinned engine. tests/monitoring asks a real engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_health import metrics

(REAL,) = (path.read_text() for path in (Path(__file__).parents[2] / "data/metrics").glob("vllm-*-cpu.txt"))
NAMES = set(re.findall(r"^([\w:]+)[{ ]", REAL, re.MULTILINE))


def test_the_engine_shows_every_metric_that_dashboards_read():
    assert set(metrics.ALWAYS_SHOWN) <= NAMES
    assert metrics.HTTP_REQUESTS in NAMES


@pytest.mark.parametrize("histogram", metrics.HISTOGRAMS)
def test_histograms_have_buckets(histogram):
    assert {f"{histogram}_{part}" for part in ("bucket", "sum", "count")} <= NAMES


@pytest.mark.parametrize("histogram", metrics.BUCKETS)
def test_bucket_bounds_are_those_of_the_engine(histogram):
    bounds = re.findall(rf'^{histogram}_bucket{{.*le="([\d.]+)"', REAL, re.MULTILINE)
    assert tuple(map(float, bounds)) == metrics.BUCKETS[histogram]
