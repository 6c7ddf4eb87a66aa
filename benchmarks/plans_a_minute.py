#!/usr/bin/env python3
"""Measure how many plans one core makes per minute, for several models and machines in turn: at least 10,000."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.model.read import read_model
from vllm_launch.plan.plan import plan
from vllm_launch.plan.request import PlanRequest

MODELS = Path(__file__).parents[1] / "tests/data/models"
NAMES = (
    "meta-llama--Llama-3.1-8B-Instruct",
    "meta-llama--Meta-Llama-3-70B",
    "openai--gpt-oss-20b",
    "google--gemma-2-9b",
)
MACHINES = ("H100:8", "H200:4", "A100-80GB:2", "H200:8")
SECONDS, LIMIT = 20.0, 10_000
"""CPU seconds of the measurement, and the smallest allowed number of plans per minute."""


def main() -> int:
    models = [read_model(str(MODELS / name)) for name in NAMES]
    machines = [parse_hardware_name(name) for name in MACHINES]
    cases = itertools.cycle(itertools.product(models, machines))
    for model, machine in itertools.islice(cases, len(models) * len(machines)):
        plan(PlanRequest(), machine, model)  # fills the caches that plans of one model share
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < SECONDS:
        model, machine = next(cases)
        plan(PlanRequest(max_num_seqs=64 + count % 900), machine, model)
        count += 1
    rate = count / spent * 60
    print(
        f"plans per minute on one core: {rate:,.0f} ({count} in {spent:.1f} s of CPU time; limit: at least {LIMIT:,})"
    )
    return int(rate < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
