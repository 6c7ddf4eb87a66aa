"""Dashboards and alerts against real Prometheus, Alertmanager and vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # so that tests can import what stands here
