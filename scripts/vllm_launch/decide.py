"""From settings and hardware to a plan: what the settings ask of it, and where the user's own values came from."""

from __future__ import annotations

import msgspec

from vllm_launch.engine import multicast
from vllm_launch.machine.gpus import Hardware
from vllm_launch.model.read import read_model
from vllm_launch.plan.explain import Source
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.plan.request import PlanRequest
from vllm_launch.settings.settings import Settings


def plan_request(settings: Settings) -> PlanRequest:
    """User settings that the plan must not change."""
    engine = settings.engine
    known = {name: engine[name] for name in PlanRequest.__struct_fields__ if engine.get(name) is not None}
    if known.get("dtype") == "auto":
        del known["dtype"]  # vLLM's word for "as the plan likes"
    known["objective"] = settings.launch.objective
    known["fp8_kv"] = settings.launch.quality == "fp8-kv"
    fused = multicast.fuses(engine.get("compilation_config"))
    known["fuse_allreduce_rms"] = not settings.no_multicast and fused is not False
    known["cpu_kv_cache_bytes"] = settings.cpu_kv_cache_bytes
    known["estimate_cudagraphs"] = settings.estimate_cudagraphs
    known["long_max_model_len"] = settings.long_max_model_len or bool(engine.get("hf_overrides"))
    return msgspec.convert(known, PlanRequest)


def credited(plan: Plan, settings: Settings) -> Plan:
    """Return ``plan`` whose reasons say where the user's own values came from."""
    reasons = [
        msgspec.structs.replace(reason, origin=settings.origin.get(reason.field))
        if reason.source is Source.YOU
        else reason
        for reason in plan.reasons
    ]
    return msgspec.structs.replace(plan, reasons=reasons)


def decide(settings: Settings, hardware: Hardware) -> Plan:
    """Return the plan, with the flag, variable or line that each of the user's own values came from.

    Raises:
        UsageError: the model cannot be read, or nothing fits.
    """
    engine = settings.engine
    model = read_model(
        settings.model,
        revision=text_option(engine.get("revision")),
        token=text_option(engine.get("hf_token")),
        hf_overrides=overrides if isinstance(overrides := engine.get("hf_overrides"), dict) else None,
    )
    decided = plan(plan_request(settings), hardware, model)
    return credited(decided, settings)


def text_option(value: object) -> str | None:
    """Return ``value`` where it is text: an option that is not set is None."""
    return value if isinstance(value, str) else None
