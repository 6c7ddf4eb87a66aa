"""Dashboards and alerts against real Prometheus, Alertmanager and vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "engine")]  # so that tests can import what stands here
