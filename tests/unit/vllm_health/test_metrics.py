"""The names that we read are the pinned engine's, as it was recorded; tests/monitoring asks the engine itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_health import metrics

(REAL,) = (path.read_text() for path in (Path(__file__).parents[2] / "data/metrics").glob("vllm-*-cpu.txt"))
NAMES = set(re.findall(r"^([\w:]+)[{ ]", REAL, re.MULTILINE))


def test_what_dashboards_read_is_shown():
    assert set(metrics.ALWAYS_SHOWN) <= NAMES
    assert metrics.HTTP_REQUESTS in NAMES


@pytest.mark.parametrize("histogram", metrics.HISTOGRAMS)
def test_histograms_have_buckets(histogram):
    assert {f"{histogram}_{part}" for part in ("bucket", "sum", "count")} <= NAMES


@pytest.mark.parametrize("histogram", metrics.BUCKETS)
def test_bounds_are_the_engines(histogram):
    bounds = re.findall(rf'^{histogram}_bucket{{.*le="([\d.]+)"', REAL, re.MULTILINE)
    assert tuple(map(float, bounds)) == metrics.BUCKETS[histogram]
