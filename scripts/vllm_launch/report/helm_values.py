"""Writes a plan as values of the chart."""

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
"""One more that a plan can be said in; it needs the settings too."""


def helm_values(plan: Plan, hardware: Hardware, settings: Settings, *, folder: bool) -> str:
    """Values of the chart (helm/values.yaml) that give ``plan`` in a cluster of such machines, as YAML.

    What the plan decided is not among them, since each pod plans again for what is free where it lands: only what the
    person said, how many GPUs a pod has, and how many pods there are. Replicas become pods, which roll and drain one by
    one, unless they share their experts or the person asked for data parallelism. ``folder``: the model is a folder,
    which the pods will find below /models.
    """
    import yaml  # noqa: PLC0415 - as above

    engine = {name: value for name, value in settings.engine.items() if name not in SECRETS}
    config: dict[str, object] = {"model": settings.model}
    if folder:
        config["model"] = f"/models/{PurePath(settings.model).name}"
    config |= {name.replace("_", "-"): value for name, value in engine.items()}
    launch = msgspec.to_builtins(settings.launch)
    said = {name: value for name, value in launch.items() if f"launch.{name}" in settings.origin and name not in PATHS}
    config |= {"launch": said} if said else {}
    expert_parallel = engine.get("enable_expert_parallel") or plan.options.get("enable_expert_parallel")
    together = "data_parallel_size" in engine or expert_parallel
    replicas = 1 if together else plan.data_parallel_size
    count = len(plan.gpus) // replicas
    values: dict[str, object] = {"config": config, "gpus": {"count": count}}
    if count:
        profile = plan.gpus[0].mig_profile
        values["gpus"] = {"count": count} | ({"resource": f"nvidia.com/mig-{profile}"} if profile else {})
        values["resources"] = {"memory": f"{16 + 16 * count}Gi"}
    else:
        memory = plan.memory
        taken = memory.weights + memory.non_torch + memory.activation_peak + plan.kv_cache.bytes + memory.safety
        values["resources"] = {"memory": f"{-(-taken >> 30) + 1}Gi"}
    if folder:
        values["models"] = {"claim": "models"}
    if replicas > 1:
        values |= {"replicas": replicas, "cache": {"kind": "ephemeral"}}
    head = f"# {plan.model} on {machine_name(hardware, plan.gpus)}, for {plan.objective}\n"
    return head + yaml.safe_dump(msgspec.to_builtins(values), sort_keys=False, allow_unicode=True)
