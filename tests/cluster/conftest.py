"""A release of the chart with the real CPU engine on the cluster that KUBECONFIG names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "chart"),
]  # so that tests can import what stands here


CONFIG = []


def pytest_configure(config):
    CONFIG.append(config)


def pytest_runtest_logreport(report):
    """What failed is said at once: these tests take many minutes."""
    if report.failed:
        said = "\n".join(text for _, text in report.sections)
        reporter = CONFIG[0].pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\n{report.longreprtext[-6000:]}\n{said[-3000:]}")
