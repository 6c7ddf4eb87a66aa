"""Values and combinations of vLLM's options that vLLM refuses for every model.

vLLM itself reports them only some time after its start.

Rules that depend on the model are in ``plan.refusals``.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_launch.engine import speculative
from vllm_launch.engine.options import names_of, nearest, options, pinned_vllm
from vllm_launch.settings import parallel_rules
from vllm_launch.settings.mistake import Engine, Mistake, number, table
from vllm_launch.settings.settings import Settings

NEEDS = (
    ("lora_modules", "enable_lora", "vLLM loads adapters only with --enable-lora"),
    ("enable_auto_tool_choice", "tool_call_parser", "it needs a parser for the model's tool calls"),
    ("enable_log_outputs", "enable_log_requests", "vLLM logs outputs only of requests that it logs"),
    ("enable_eplb", "enable_expert_parallel", "load balancing of experts needs expert parallelism"),
    ("enable_elastic_ep", "enable_eplb", "elastic expert parallelism needs --enable-eplb"),
    ("numa_bind_nodes", "numa_bind", "it only has an effect with --numa-bind"),
    ("numa_bind_cpus", "numa_bind", "it only has an effect with --numa-bind"),
    ("ray_workers_use_nsight", "distributed_executor_backend", "nsight profiles only Ray's workers"),
)
"""(option, option that it needs, why). vLLM refuses the first without the second.

Source: entrypoints/launchers/cli_args.py:validate_parsed_serve_args, config/parallel.py, and for adapters
v1/worker/lora_model_runner_mixin.py:add_lora (RuntimeError after the model is loaded)."""

VALUES = {"tool_call_parser": "NAME", "distributed_executor_backend": "ray"}
"""The value to add, by needed option. The others are switches."""


def _needs(engine: Engine) -> Iterator[Mistake]:
    for dest, needed, why in NEEDS:
        if engine.get(dest) and not engine.get(needed):
            addition = f"--{needed.replace('_', '-')} {VALUES.get(needed, '')}".rstrip()
            yield Mistake(dest, why, f"add {addition}, or remove --{dest.replace('_', '-')}")


def _adapters(engine: Engine) -> Iterator[Mistake]:
    most, at_once = number(engine, "max_cpu_loras", 0), number(engine, "max_loras", 1)
    if engine.get("enable_lora") and 0 < most < at_once:
        problem = f"max_cpu_loras {most} is less than max_loras {at_once}"
        yield Mistake("max_cpu_loras", problem, f"set --max-cpu-loras to {at_once} or more, or remove it")


def _metrics(engine: Engine) -> Iterator[Mistake]:
    if engine.get("enable_per_request_metrics") and engine.get("disable_log_stats"):
        problem = "it needs the statistics that --disable-log-stats switches off"
        yield Mistake("enable_per_request_metrics", problem, "remove one of them")
    if (seconds := number(engine, "sse_keep_alive_interval", 0)) < 0:
        yield Mistake("sse_keep_alive_interval", f"sse_keep_alive_interval is {seconds}", "give 0 or more seconds")


def _others(engine: Engine) -> Iterator[Mistake]:
    """Yield mistakes in microbatching, sampling masks and pooling types.

    Source: config/vllm.py, config/pooler.py.
    """
    splits_batch = engine.get("enable_dbo") or number(engine, "ubatch_size", 0) > 1
    if splits_batch and engine.get("all2all_backend") not in UBATCHING:
        dest = "enable_dbo" if engine.get("enable_dbo") else "ubatch_size"
        flag, backends = f"--{dest.replace('_', '-')}", f"{', '.join(UBATCHING[:-1])} or {UBATCHING[-1]}"
        problem = f"{flag} needs --all2all-backend {backends}"
        yield Mistake(dest, problem, f"add one, or remove {flag}")
    if engine.get("return_sampling_mask") and engine.get("logprobs_mode") != "processed_logprobs":
        yield Mistake("return_sampling_mask", "it needs processed logprobs", "add --logprobs-mode processed_logprobs")
    pooling_type = table(engine, "pooler_config").get("pooling_type")
    if pooling_type is not None and pooling_type not in POOLING_TYPES:
        problem = f"vLLM has no pooling_type {pooling_type!r}"
        yield Mistake("pooler_config", problem, f"give one of {', '.join(POOLING_TYPES)}")


UBATCHING = ("deepep_low_latency", "deepep_high_throughput", "nixl_ep")
"""Values of all2all_backend with which vLLM splits a batch (config/vllm.py:VllmConfig.__post_init__)."""

POOLING_TYPES = ("ALL", "CLS", "LAST", "MEAN", "STEP")
"""Pooling types of vLLM (config/pooler.py)."""


def _transfer(engine: Engine) -> Iterator[Mistake]:
    """Yield connectors without a role or with an unknown role.

    Source: config/kv_transfer.py, config/ec_transfer.py.
    """
    for dest, kind in (("kv_transfer_config", "kv"), ("ec_transfer_config", "ec")):
        config = table(engine, dest)
        roles = ROLES[kind]
        role = config.get(f"{kind}_role")
        if role is not None and role not in roles:
            yield Mistake(dest, f"{kind}_role {role!r} is not valid", f"give one of {', '.join(roles)}")
        elif config.get(f"{kind}_connector") and role is None:
            yield Mistake(
                dest, f"a {kind}_connector needs a {kind}_role", f"add {kind}_role, one of {', '.join(roles)}"
            )


ROLES = {
    "kv": ("kv_producer", "kv_consumer", "kv_both"),
    "ec": ("ec_producer", "ec_consumer", "ec_both"),
}
"""Roles of a connector (config/kv_transfer.py:KVRole, config/ec_transfer.py:ECRole)."""


def _known_names(engine: Engine) -> Iterator[Mistake]:
    """Yield names that are not in vLLM's registries. A name is not checked if the user sets a plugin."""
    for kind, (dest, key, plugin) in LOOKED_UP.items():
        name = table(engine, dest).get(key) if key else engine.get(dest)
        from_plugin = plugin and (table(engine, dest).get(plugin) if key else engine.get(plugin))
        if not isinstance(name, str) or from_plugin:
            continue
        known = names_of(kind)
        if name not in known and not (kind == "attention_backend" and name.upper() in {*known, "AUTO"}):
            yield Mistake(dest, f"vLLM {pinned_vllm()} has no {kind.replace('_', ' ')} {name!r}", nearest(name, known))


LOOKED_UP = {
    "speculative_method": ("speculative_config", "method", None),
    "kv_connector": ("kv_transfer_config", "kv_connector", "kv_connector_module_path"),
    "attention_backend": ("attention_backend", None, None),
    "tool_call_parser": ("tool_call_parser", None, "tool_parser_plugin"),
    "reasoning_parser": ("reasoning_parser", None, "reasoning_parser_plugin"),
}
"""By registry: (option, key of its JSON object, option or key of a plugin that adds names)."""


def _limits(engine: Engine) -> Iterator[Mistake]:
    """Yield values outside the limits of the fields of vLLM's config classes."""
    for dest, value in engine.items():
        option = options().get(dest)
        if option is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, high = option.minimum, option.maximum
        if low is not None and (value < low or (option.above_minimum and value == low)):
            yield Mistake(
                dest,
                f"{dest} is {value}",
                f"give {'more than ' if option.above_minimum else ''}{low:g}"
                + ("" if option.above_minimum else " or more"),
            )
        if high is not None and (value > high or (option.below_maximum and value == high)):
            yield Mistake(
                dest, f"{dest} is {value}", f"give {'less than' if option.below_maximum else 'at most'} {high:g}"
            )


def _drafts(engine: Engine) -> Iterator[Mistake]:
    """Yield mistakes in the options for speculative decoding.

    Source: config/speculative.py:SpeculativeConfig.__post_init__.
    """
    config = speculative.speculative_config(engine)
    if not config:
        return
    dest = next(name for name in ("speculative_config", *speculative.FLAGS) if engine.get(name) is not None)
    method, model, tokens = config.get("method"), config.get("model"), config.get("num_speculative_tokens")
    ngram = str(method).strip("[]").startswith("ngram")
    if method is None and model is None:
        yield Mistake(dest, "it names no method and no draft model", 'add "method" or "model"')
    elif model is None and method in speculative.NEED_MODEL:
        yield Mistake(dest, f"{method} needs a model", 'add "model"')
    if ngram and not tokens:
        yield Mistake(dest, f"{method} needs num_speculative_tokens", 'add for example "num_speculative_tokens": 4')
    low, high = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    if ngram and isinstance(low, int) and isinstance(high, int) and low > high:
        yield Mistake(dest, f"prompt_lookup_min {low} is more than prompt_lookup_max {high}", "lower it")
    if engine.get("async_scheduling") and method in {"ngram", "suffix", "medusa", "mlp_speculator"}:
        problem = f"vLLM does not schedule asynchronously with {method}"
        yield Mistake("async_scheduling", problem, "remove it: vLLM chooses by itself")


RULES = (
    _needs, _adapters, _metrics, *parallel_rules.RULES, _transfer, _drafts, _known_names, _limits, _others,
)  # fmt: skip
"""Rules in the order of their checks."""


def mistakes(settings: Settings) -> Iterator[Mistake]:
    """Yield each combination that vLLM refuses."""
    for rule in RULES:
        yield from rule(settings.engine)
