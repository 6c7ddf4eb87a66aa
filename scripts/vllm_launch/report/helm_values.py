"""Writes a plan as values of the Helm chart."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

import msgspec

from vllm_launch.engine.options import SECRETS
from vllm_launch.machine.gpus import Hardware
from vllm_launch.plan.plan import Plan
from vllm_launch.report.machine_table import machine_name
from vllm_launch.settings.read import PATHS
from vllm_launch.settings.settings import Settings

HELM: Literal["helm"] = "helm"
"""Name of this output format. Unlike the formats of ``plan_table``, it also needs the settings."""


def helm_values(plan: Plan, hardware: Hardware, settings: Settings, *, folder: bool) -> str:
    """Return YAML with the chart's values (helm/values.yaml) that lead to ``plan`` in a cluster of such machines.

    The values have the user's settings, the number of GPUs of a pod, and the number of pods. They do not have the
    plan's decisions, because each pod plans again for the free memory of its own node. Each replica becomes a pod, so
    that a rollout replaces and drains one replica at a time. Replicas stay in one pod if they share experts, or if
    the user set data parallelism. ``folder``: the model is a folder, which the pods will find below /models.
    """
    import yaml  # noqa: PLC0415 - only this format needs it

    engine = {name: value for name, value in settings.engine.items() if name not in SECRETS}
    config: dict[str, object] = {"model": settings.model}
    if folder:
        config["model"] = f"/models/{PurePath(settings.model).name}"
    config |= {name.replace("_", "-"): value for name, value in engine.items()}
    launch = msgspec.to_builtins(settings.launch)
    user_set = {
        name: value for name, value in launch.items() if f"launch.{name}" in settings.origin and name not in PATHS
    }
    config |= {"launch": user_set} if user_set else {}
    expert_parallel = engine.get("enable_expert_parallel") or plan.options.get("enable_expert_parallel")
    one_pod = "data_parallel_size" in engine or expert_parallel
    replicas = 1 if one_pod else plan.data_parallel_size
    count = len(plan.gpus) // replicas
    values: dict[str, object] = {"config": config, "gpus": {"count": count}}
    if count:
        profile = plan.gpus[0].mig_profile
        values["gpus"] = {"count": count} | ({"resource": f"nvidia.com/mig-{profile}"} if profile else {})
        values["resources"] = {"memory": f"{16 + 16 * count}Gi"}
    else:
        memory = plan.memory
        total = memory.weights + memory.non_torch + memory.activation_peak + plan.kv_cache.bytes + memory.safety
        values["resources"] = {"memory": f"{-(-total >> 30) + 1}Gi"}
    if folder:
        values["models"] = {"claim": "models"}
    if replicas > 1:
        values |= {"replicas": replicas, "cache": {"kind": "ephemeral"}}
    head = f"# {plan.model} on {machine_name(hardware, plan.gpus)}, for {plan.objective}\n"
    return head + yaml.safe_dump(msgspec.to_builtins(values), sort_keys=False, allow_unicode=True)
