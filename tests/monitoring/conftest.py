"""Tests of dashboards and alerts with a real Prometheus, Alertmanager and vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # Tests import modules of this folder.
