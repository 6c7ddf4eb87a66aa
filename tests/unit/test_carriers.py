"""Ports and times that a shell script, Compose and Helm must spell again are those that the launcher has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_health import addresses
from vllm_launch.engine.options import options
from vllm_launch.settings.settings import LauncherSettings

ROOT = Path(__file__).parents[2]
API, HEALTH, DRAIN = options()["port"].default, LauncherSettings().health_port, LauncherSettings().drain_seconds


def test_vllms_port_is_the_pinned_vllms():
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
def test_a_carrier_has_the_launchers_port_or_time(file, pattern, expected):
    found = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert {tuple(map(int, one)) if isinstance(one, tuple) else int(one) for one in found} == expected
