"""Makes a plan from settings and hardware, and records where each of the user's own values came from."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import msgspec

from vllm_launch.engine import speculative
from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Hardware
from vllm_launch.model.model import Model
from vllm_launch.model.read import read_model
from vllm_launch.plan import refusals
from vllm_launch.plan.plan import Plan, plan
from vllm_launch.plan.reason import Source
from vllm_launch.plan.request import PlanRequest, without_windows
from vllm_launch.settings import rules
from vllm_launch.settings.settings import Settings

OTHER_TOKENIZER = ("tokenizer", "tokenizer_mode", "skip_tokenizer_init")
"""Options with which vLLM does not read the tokenizer of the model, so that the plan does not know its template."""
PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def plan_request(settings: Settings) -> PlanRequest:
    """Return the user settings that the plan must not change.

    Raises:
        UsageError: a JSON value has another type than vLLM's option takes.
    """
    engine = settings.chosen
    fields = {name: engine[name] for name in PlanRequest.__struct_fields__ if engine.get(name) is not None}
    fields["objective"] = settings.launch.objective
    fields["parsers"] = settings.launch.parsers == "auto"
    fields["fp8_kv"] = settings.launch.quality == "fp8-kv"
    fields["fuse_allreduce_rms"] = not settings.no_multicast
    fields["num_speculative_tokens"] = speculative.draft_tokens(engine)
    fields["verifies_in_chunks"] = not speculative.needs_runner_v1(engine)
    fields["redundant_experts"] = redundant_experts(engine.get("eplb_config"))
    fields["cpu_kv_cache_bytes"] = settings.cpu_kv_cache_bytes
    fields["estimate_cudagraphs"] = settings.estimate_cudagraphs
    fields["expandable_segments"] = settings.expandable_segments
    fields["long_max_model_len"] = settings.long_max_model_len or bool(engine.get("hf_overrides"))
    try:
        return msgspec.convert(fields, PlanRequest)
    except msgspec.ValidationError as error:
        raise _wrong_type(settings, str(error)) from error


def _wrong_type(settings: Settings, error: str) -> UsageError:
    """Return the error for a value whose type does not match its field of ``PlanRequest``.

    ``error``: msgspec's text, such as "Expected `int`, got `str` - at `$.limit_mm_per_prompt[...]`".
    """
    problem, _, place = error.partition(" - at ")
    dest = found[0] if (found := re.search(r"\w+", place)) else "vLLM's options"
    expected = problem.replace("`", "").replace(" | ", " or ")
    return UsageError(
        settings.origin.get(dest, dest),
        f"a value has the wrong type: {expected[:1].lower()}{expected[1:]}",
        "write it as `vllm serve --help=all` describes",
    )


def redundant_experts(eplb_config: object) -> int:
    """Return the number of redundant experts that ``eplb_config`` sets."""
    count = eplb_config.get("num_redundant_experts") if isinstance(eplb_config, dict) else None
    return max(0, count) if isinstance(count, int) else 0


def with_origins(plan: Plan, settings: Settings) -> Plan:
    """Return ``plan`` with reasons that name the origin of each value that the user set."""
    reasons = [
        msgspec.structs.replace(reason, origin=settings.origin.get(reason.field))
        if reason.source is Source.YOU
        else reason
        for reason in plan.reasons
    ]
    return msgspec.structs.replace(plan, reasons=reasons)


def decide(settings: Settings, hardware: Hardware) -> Plan:
    """Return the plan. Its reasons name the flag, variable or line of each value that the user set.

    Raises:
        UsageError: the model cannot be read, or no plan fits the hardware.
    """
    engine = settings.engine
    model = read_model(
        settings.model,
        revision=text_option(engine.get("revision")),
        token=text_option(engine.get("hf_token")),
        hf_overrides=object_option(engine.get("hf_overrides")),
        runner=text_option(engine.get("runner")),
        convert=text_option(engine.get("convert")),
        chat_template=text_option(engine.get("chat_template")),
        chat_template_kwargs=object_option(engine.get("default_chat_template_kwargs")),
        processor_options=object_option(engine.get("mm_processor_kwargs")),
        pooler_config=object_option(engine.get("pooler_config")),
    )
    _check_torchvision(hardware, model)
    if any(engine.get(option) not in {None, "auto", False} for option in OTHER_TOKENIZER):
        model = msgspec.structs.replace(model, chat=None)
    if engine.get("disable_sliding_window"):
        model = without_windows(model)
    request = plan_request(settings)
    case = refusals.Case(settings, request, model, on_gpu=bool(hardware.gpus))
    refusals.check(case)
    if model.quantization is not None:  # vLLM uses the checkpoint's method, whatever accepted name the user gave
        request = msgspec.structs.replace(request, quantization=None)
    decided = plan(request, hardware, model)
    _check_planned(case, decided)
    decided = msgspec.structs.replace(decided, warnings=[*decided.warnings, *refusals.warnings(case)])
    return with_origins(decided, settings)


def _check_planned(case: refusals.Case, decided: Plan) -> None:
    """Check the user's options together with those that the plan sets.

    Raises:
        UsageError: vLLM would refuse the command line.
    """
    sizes = {name: getattr(decided, name) for name in PARALLEL_SIZES}
    together = msgspec.structs.replace(case.settings, engine=sizes | decided.options | dict(case.settings.chosen))
    rules.check_combinations(together)
    refusals.check(case._replace(settings=together))


def _check_torchvision(hardware: Hardware, model: Model) -> None:
    """Check that vLLM on a CPU can import the model. vLLM runs in this Python environment.

    Raises:
        UsageError: the model needs torchvision, and it is not installed.
    """
    needed = not hardware.gpus and model.media is not None and model.media.needs_torchvision
    if needed and importlib.util.find_spec("torchvision") is None:
        raise UsageError(
            f"{model.name} on a CPU",
            f"vLLM's {model.architecture} needs torchvision, which vLLM's packages for CPUs do not include",
            "install torchvision for CPUs beside vLLM, or plan for GPUs with --hardware",
        )


def text_option(value: object) -> str | None:
    """Return ``value`` if it is text, else None (the option is not set)."""
    return value if isinstance(value, str) else None


def object_option(value: object) -> dict[str, Any] | None:
    """Return ``value`` if it is a JSON object, else None (the option is not set)."""
    return value if isinstance(value, dict) else None
