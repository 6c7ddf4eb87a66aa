"""The type of an alert, and text templates for all alerts.

The summary says what is wrong and where. The description says what it means. The runbook says what to do.

The result of each expression has the label ``namespace`` and, if its series have it, ``model_name``. The metrics of
kube-state-metrics do not have it. An alert about one replica also keeps ``pod``.

tests/monitoring/test_mutants.py changes each comparison, each operator ``and``, ``or`` and ``unless`` of the
expressions, and each value of thresholds.yaml, one at a time. A test must fail after each change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from vllm_health import metrics
from vllm_monitoring.records import POD, Rule
from vllm_monitoring.thresholds import Limit

ENGINE: Final = f"{POD}, {metrics.ENGINE}"
MODEL_TEXT: Final = "{{ $labels.model_name }} in {{ $labels.namespace }}"
POD_TEXT: Final = "{{ $labels.pod }} in {{ $labels.namespace }} ({{ $labels.model_name }})"
GPU_TEXT: Final = "GPU {{ $labels.gpu }} of {{ $labels.pod }} in {{ $labels.namespace }}"
"""Prometheus templates that begin a summary: the model, the replica or the GPU that has the fault."""
PREFIX: Final = metrics.PREFIX
READY: Final = f"{PREFIX}ready"

Limits = Mapping[str, Limit]
"""The limits of thresholds.yaml, by alert name."""


class Alert(msgspec.Struct, frozen=True):
    """One alert. ``duration``: how long ``expr`` must be true, Prometheus' field "for".

    ``labels`` (besides ``severity``) distinguish alerts of the same name.
    """

    name: str
    severity: str
    duration: str
    expr: str
    summary: str
    description: str
    labels: dict[str, str] = {}

    def rule(self, runbook_url: str) -> Rule:
        """Return the alert as Prometheus reads it. It links to ``runbook_url`` if that is not empty."""
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.duration} if self.duration != "0s" else {}),
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook": f"monitoring/runbooks/{self.name}.md",
                **({"runbook_url": runbook_url} if runbook_url else {}),
            },
        }


def alert_with_limit(limits: Limits, name: str, expr: str, summary: str, description: str) -> Alert:
    """Return the alert ``name`` with the severity and the duration of its limit."""
    limit = limits[name]
    return Alert(name, limit.severity, limit.duration, expr, summary, description)


def state_selector(name: str) -> str:
    """Return the selector of the series that is 1 while a replica is in the state ``name``."""
    return f'{PREFIX}state{{state="{name}"}}'
