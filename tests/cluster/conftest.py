"""A release of the chart with the real CPU engine on the cluster that KUBECONFIG names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "chart"),
]  # so that tests can import what stands here


PULL_SECONDS = 900
"""The image has 5.5 GB, and CI's other lane keeps a core and the disk busy meanwhile."""

CONFIG = []


@pytest.fixture(scope="session", autouse=True)
def image_on_the_node():
    """Pulled before any test waits for a pod: how long that takes says nothing of the chart."""
    from cluster import run_once  # noqa: PLC0415 - found only by the path above

    run_once(["true"], seconds=PULL_SECONDS)


def pytest_configure(config):
    CONFIG.append(config)


def pytest_runtest_logreport(report):
    """What failed is said at once: these tests take many minutes."""
    if report.failed:
        said = "\n".join(text for _, text in report.sections)
        reporter = CONFIG[0].pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\n{report.longreprtext[-6000:]}\n{said[-3000:]}")
