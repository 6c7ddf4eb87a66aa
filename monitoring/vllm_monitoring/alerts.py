"""Alerts. A summary says what is wrong and where, a description what that means, a runbook what to do.

An expression keeps the labels that name the model and, where one replica is meant, the pod. Every comparison in it, and
every number of thresholds.yaml, is changed by tests/monitoring/test_mutants.py, and a test must notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from vllm_health import metrics
from vllm_monitoring.records import POD, Rule
from vllm_monitoring.thresholds import Limit

ENGINE: Final = f"{POD}, {metrics.ENGINE}"
MODEL_NAMED: Final = "{{ $labels.model_name }} in {{ $labels.namespace }}"
POD_NAMED: Final = "{{ $labels.pod }} in {{ $labels.namespace }}, which serves {{ $labels.model_name }},"
GPU_NAMED: Final = "GPU {{ $labels.gpu }} of {{ $labels.pod }} in {{ $labels.namespace }}"
OURS: Final = metrics.PREFIX
READY: Final = f"{OURS}ready"

Limits = Mapping[str, Limit]
"""The limits of thresholds.yaml, by the names of their alerts."""


class Alert(msgspec.Struct, frozen=True):
    """``labels`` beside ``severity`` tell the variants of one name apart."""

    name: str
    severity: str
    held: str
    expr: str
    summary: str
    description: str
    labels: dict[str, str] = {}

    def rule(self, runbook: str) -> Rule:
        """Return the alert as Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.held} if self.held != "0s" else {}),
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": runbook,
            },
        }


def limited(limits: Limits, name: str, expr: str, summary: str, description: str) -> Alert:
    """Return the alert ``name`` with the severity and the duration of its limit."""
    limit = limits[name]
    return Alert(name, limit.severity, limit.held, expr, summary, description)


def in_state(name: str) -> str:
    """Return the selector of the series that is 1 while a replica is in the state ``name``."""
    return f'{OURS}state{{state="{name}"}}'
