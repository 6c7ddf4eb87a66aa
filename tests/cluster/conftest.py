"""A release of the chart with the real CPU engine on the cluster that KUBECONFIG names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "chart"),
]  # so that tests can import what stands here
