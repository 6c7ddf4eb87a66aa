"""Tests of releases of the chart with the real CPU engine, on the cluster of KUBECONFIG."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "chart"),
]  # so that tests can import the modules in these folders


PULL_SECONDS = 900
"""Time limit of the pull. The image has 5.5 GB, and CI's other lane uses a core and the disk meanwhile."""

CONFIG = []


@pytest.fixture(scope="session", autouse=True)
def image_on_the_node():
    """Pulls the image before any test waits for a pod, so that no test's timeout includes the pull."""
    from cluster import run_once  # noqa: PLC0415 - importable only with the path above

    run_once(["true"], seconds=PULL_SECONDS)


def pytest_configure(config):
    CONFIG.append(config)


def pytest_runtest_logreport(report):
    """Print each failure at once, because these tests take many minutes."""
    if report.failed:
        output = "\n".join(text for _, text in report.sections)
        reporter = CONFIG[0].pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\n{report.longreprtext[-6000:]}\n{output[-3000:]}")
