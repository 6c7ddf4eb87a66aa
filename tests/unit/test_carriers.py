"""Ports and drain times in Dockerfile, shell scripts, Compose, Helm and Prometheus equal the launcher's defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_health import addresses
from vllm_launch.engine.options import options
from vllm_launch.settings.settings import LauncherSettings

ROOT = Path(__file__).parents[2]
API, HEALTH, DRAIN = options()["port"].default, LauncherSettings().health_port, LauncherSettings().drain_seconds


def test_our_api_port_is_the_default_of_the_pinned_vllm():
    assert addresses.API_PORT == API


@pytest.mark.parametrize(
    ("file", "pattern", "expected"),
    [
        ("docker/Dockerfile", r"^EXPOSE (\d+) (\d+)$", {(API, HEALTH)}),
        ("docker/healthcheck.sh", r"LAUNCH_HEALTH_PORT:-(\d+)", {HEALTH}),
        ("compose/compose.yaml", r"API_PORT:-(\d+)\}:(\d+)", {(API, API)}),
        ("compose/compose.keys.yaml", r"API_PORT:-(\d+)\}:(\d+)", {(API, API)}),
        ("compose/compose.yaml", r"DRAIN_SECONDS:-(\d+)\}", {DRAIN}),
        ("helm/templates/_facts.tpl", r"config\.port \| default (\d+)", {API}),
        ("helm/templates/_facts.tpl", r'"health_port" (\d+)', {HEALTH}),
        ("helm/templates/_facts.tpl", r'"drain_seconds" (\d+)', {DRAIN}),
        ("monitoring/prometheus/prometheus.yml", r'"vllm:(\d+)"', {API, HEALTH}),
    ],
)
def test_a_file_has_the_launchers_port_or_drain_time(file, pattern, expected):
    matches = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert {tuple(map(int, match)) if isinstance(match, tuple) else int(match) for match in matches} == expected
