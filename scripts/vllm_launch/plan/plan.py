"""Decides how vLLM should run: a pure function from what was asked, the hardware and the model to a Plan.

``fit`` says what one split on certain GPUs would hold; here splits and GPUs are chosen among, ``explain`` puts the
choice into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Gpu, Hardware, alike, gpu_too_old
from vllm_launch.model.model import Model
from vllm_launch.plan import explain
from vllm_launch.plan.explain import Reason, Rejected
from vllm_launch.plan.fit import Candidate, NoFit, batch_of, on_cpu, on_gpus, run_of, watermark_of
from vllm_launch.plan.request import Asked, Objective
from vllm_launch.sizing.kv import KvCache
from vllm_launch.sizing.memory import Memory
from vllm_launch.sizing.parallel import Layout, problems
from vllm_launch.sizing.run_config import Run, default_batch

SMALLER_BATCHES = ((2048, 256), (2048, 64), (512, 16))
"""(max_num_batched_tokens, max_num_seqs) to try in turn when vLLM's defaults leave no room: both cost memory."""

NEAREST = 3
"""How many things that would fit are named when nothing does."""

LARGER = ("A100-80GB", "H200", "B200")
"""GPUs that are named when those at hand are too small."""

UNEVEN = 50
"""GPUs whose free memory differs by less than one part in so many of the whole are taken for equal: a desktop, or what
a monitoring agent holds, must not change which GPUs are neighbours."""

PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
DECIDED = (
    *PARALLEL, "enable_expert_parallel", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "watermark", "kv_cache_dtype",
)  # fmt: skip
"""vLLM's options that a plan may set; the other fields that reasons speak of are not options."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to run. As JSON this is a contract (``plan --format json``). Bytes; ``memory`` is of the tightest GPU."""

    model: str
    objective: Objective
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    gpus: int  # per replica; 0 on the CPU engine
    gpu_memory_utilization: float  # 0.0 on the CPU engine, which is given kv_cache_memory_bytes instead
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    watermark: float  # share of the KV cache
    kv_cache: KvCache
    memory: Memory
    argv: list[str]
    env: dict[str, str]
    reasons: list[Reason]
    rejected: list[Rejected]
    warnings: list[str]

    @property
    def decided(self) -> dict[str, object]:
        """Options of vLLM that the plan sets, by dest. What the person set is not among them; nothing has no reason."""
        return {
            reason.field: reason.value
            for reason in self.reasons
            if reason.field in DECIDED
            and not reason.source.startswith(explain.YOU)
            and not (reason.field in PARALLEL and reason.value == 1)
        }


def plan(asked: Asked, hardware: Hardware, model: Model) -> Plan:
    """How to run ``model`` on ``hardware``; ``argv`` is empty, ``command`` fills it in.

    Raises:
        UsageError: nothing that was asked for fits, or vLLM would refuse it; the text says what would fit.
    """
    if asked.length is not None and asked.length > model.max_model_len and not asked.long_max_model_len:
        raise UsageError(
            f"max_model_len {asked.length}",
            f"the model itself is made for {model.max_model_len} tokens and vLLM refuses more",
            "lower it, or set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if the model is known to hold up",
        )
    if not hardware.gpus:
        return _plan_cpu(asked, hardware, model)
    usable = tuple(gpu for gpu in hardware.gpus if not gpu_too_old(gpu))
    if not usable:
        why = "; ".join(dict.fromkeys(gpu_too_old(gpu) or "" for gpu in hardware.gpus))
        raise UsageError("hardware", why, "take newer GPUs, or hide these (CUDA_VISIBLE_DEVICES=) to use the CPU")
    chosen, missed = _choose(asked, hardware, usable, model)
    if chosen is None:
        raise _nothing_fits(asked, hardware, usable, model, missed)
    return _stated(asked, hardware, model, chosen, missed)


def _stated(asked: Asked, hardware: Hardware, model: Model, chosen: Candidate, missed: Sequence[NoFit]) -> Plan:
    layout, run = chosen.layout, chosen.run
    return Plan(
        model=model.name,
        objective=asked.objective,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        data_parallel_size=layout.data,
        gpus=layout.tensor * layout.pipeline if chosen.gpus else 0,
        gpu_memory_utilization=chosen.utilization,
        max_model_len=run.max_model_len,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        watermark=watermark_of(asked, model, chosen),
        kv_cache=chosen.kv_cache,
        memory=chosen.memory,
        argv=[],
        env=_environment(hardware, chosen),
        reasons=explain.reasons(asked, hardware, model, chosen),
        rejected=[Rejected(plan=miss.layout.title, why=miss.why) for miss in missed],
        warnings=[*hardware.warnings, *model.warnings, *explain.warnings(asked, hardware, model, chosen)],
    )


def _environment(hardware: Hardware, chosen: Candidate) -> dict[str, str]:
    """Which GPUs vLLM sees, where they are not all in order, and that it need not guess at CUDA graphs.

    GPUs by index in bus order, which is NVML's, because vLLM reads whole numbers there; a MIG slice has only a UUID.
    """
    gpus = chosen.gpus
    if not gpus:
        return {}
    found = {} if chosen.run.estimate_cudagraphs else {"VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}
    if gpus == hardware.gpus and len({gpu.name for gpu in gpus}) == 1 and not gpus[0].mig_profile:
        return found
    names = [gpu.uuid if gpu.mig_profile else str(gpu.index) for gpu in gpus]
    return found | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}


# ---- which GPUs, which split


def _choose(
    asked: Asked, hardware: Hardware, gpus: Sequence[Gpu], model: Model
) -> tuple[Candidate | None, list[NoFit]]:
    """The best of all groups, None where nothing holds, and what was considered before it."""
    kept: list[tuple[Candidate, list[NoFit]]] = []
    missed: list[NoFit] = []
    for group in _groups(asked, hardware, gpus):
        found, misses = _best(asked, hardware, group, model)
        if found is None:
            missed += misses
        else:
            kept.append((found, misses))
    if not kept:
        return None, missed
    return max(kept, key=lambda pair: (pair[0].useful, pair[0].tokens))


def _groups(asked: Asked, hardware: Hardware, gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """Sets of GPUs that one vLLM may span.

    One utilisation and one number of blocks hold for every GPU of a vLLM, so unlike GPUs are mixed only where what was
    asked for needs more GPUs than there are alike. A process sees one MIG slice at most (NVIDIA MIG User Guide, "CUDA
    device enumeration"), so a slice is a group of its own.
    """
    if any(gpu.mig_profile for gpu in gpus):
        return [(gpu,) for gpu in gpus]
    groups = [_ordered(hardware, group) for group in alike(tuple(gpus))]
    needed = (asked.tensor_parallel_size or 1) * (asked.pipeline_parallel_size or 1) * (asked.data_parallel_size or 1)
    return groups if needed <= max(map(len, groups)) else [_ordered(hardware, gpus)]


def _ordered(hardware: Hardware, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The emptiest first, and those that NVLink joins to each other side by side, so that a replica gets them."""
    taken = dict(zip((gpu.uuid for gpu in gpus), _taken(gpus), strict=True))
    rest = sorted(gpus, key=lambda gpu: (taken[gpu.uuid], gpu.index))
    ordered: list[Gpu] = []
    while rest:
        mates = [gpu for gpu in rest if gpu == rest[0] or _linked(hardware, (rest[0], gpu))]
        ordered += mates
        rest = [gpu for gpu in rest if gpu not in mates]
    return tuple(ordered)


def _taken(gpus: Sequence[Gpu]) -> list[int]:
    """How much less each GPU has free than the emptiest, in parts of 1 / UNEVEN of its memory, rounded down."""
    most = max(gpu.memory_free for gpu in gpus)
    return [(most - gpu.memory_free) * UNEVEN // gpu.memory_total for gpu in gpus]


def _linked(hardware: Hardware, gpus: Sequence[Gpu]) -> bool:
    """Whether NVLink joins every pair of ``gpus``; alone, a GPU is as good as linked."""
    if not hardware.nvlink:
        return len(gpus) == 1
    rows = [hardware.gpus.index(gpu) for gpu in gpus]
    return all(a == b or hardware.nvlink[a][b] for a in rows for b in rows)


def _layouts(asked: Asked, hardware: Hardware, group: Sequence[Gpu]) -> Iterator[Layout]:
    """Splits of one replica over ``group``, best first for the objective; ``data`` is how many replicas fit there.

    Over PCIe alone a pipeline moves far less than tensor parallelism does, which is what vLLM's documentation advises
    there ("Parallelism and Scaling", on GPUs without NVLink); for latency only tensor parallelism helps.
    """
    most = len(group) // (asked.data_parallel_size or 1)
    tensors = [asked.tensor_parallel_size] if asked.tensor_parallel_size else range(1, most + 1)
    pipelines = [asked.pipeline_parallel_size] if asked.pipeline_parallel_size else range(1, most + 1)
    splits = [(tensor, pipeline) for tensor in tensors for pipeline in pipelines if tensor * pipeline <= most]
    if asked.objective == "latency":
        splits.sort(key=lambda split: (split[1], -split[0]))
    else:
        joined = {size: _linked(hardware, group[:size]) for size in {tensor * pipe for tensor, pipe in splits}}
        splits.sort(key=lambda split: (split[0] * split[1], split[1] if joined[split[0] * split[1]] else split[0]))
    for tensor, pipeline in splits:
        data = asked.data_parallel_size or len(group) // (tensor * pipeline)
        yield Layout(tensor=tensor, pipeline=pipeline, data=data, expert_parallel=bool(asked.enable_expert_parallel))


def _best(asked: Asked, hardware: Hardware, group: Sequence[Gpu], model: Model) -> tuple[Candidate | None, list[NoFit]]:
    """The first useful split on ``group``, else the one with the longest requests, else None; and what was passed over.

    vLLM's own batch comes first; smaller ones are tried when with it nothing is useful.
    """
    batches = [batch_of(asked, model, batch) for batch in (default_batch(group[0]), *SMALLER_BATCHES)]
    oldest = min(gpu.compute_capability for gpu in group)
    fallback: Candidate | None = None
    first: list[NoFit] = []
    for batch in dict.fromkeys(batch for batch in batches if max(batch) <= max(batches[0])):
        run = run_of(asked, model, batch, oldest)
        misses: list[NoFit] = []
        for layout in _layouts(asked, hardware, group):
            found = _spread(asked, layout, group, model, run)
            if isinstance(found, NoFit):
                misses.append(found)
            elif found.useful:
                return _grown(asked, hardware, group, model, found), misses
            else:
                misses.append(NoFit(layout=found.layout, why=explain.too_small(found), longest=found.run.max_model_len))
                if fallback is None or found.run.max_model_len > fallback.run.max_model_len:
                    fallback = found
        first = first or misses
    if fallback is None:
        return None, first
    return fallback, [miss for miss in first if miss.layout != fallback.layout]


def _grown(asked: Asked, hardware: Hardware, group: Sequence[Gpu], model: Model, found: Candidate) -> Candidate:
    """``found``, or the same number of replicas with more GPUs each where some would be left over, such as 1 of 4."""
    replicas, each = found.layout.data, found.layout.tensor * found.layout.pipeline
    if asked.objective == "latency" or replicas < len(group) // each:
        return found  # more stages only add to the latency; or some GPUs are too full to help
    for size in range(len(group) // replicas, each, -1):
        for layout in _layouts(asked, hardware, group):
            if (layout.tensor * layout.pipeline, layout.data) == (size, replicas):
                larger = _spread(asked, layout, group, model, found.run)
                if isinstance(larger, Candidate) and larger.tokens > found.tokens:
                    return larger
    return found


def _spread(asked: Asked, layout: Layout, group: Sequence[Gpu], model: Model, run: Run) -> Candidate | NoFit:
    """``layout`` with as many replicas as give the most tokens: a GPU that is half taken drags all of them down.

    Where the experts' width cannot be cut, whole experts can be spread (expert parallelism), unless that was asked for
    or denied.
    """
    if model.experts and asked.enable_expert_parallel is None and problems(model, run, layout, group):
        whole = msgspec.structs.replace(layout, expert_parallel=True)
        layout = layout if problems(model, run, whole, group) else whole
    each = layout.tensor * layout.pipeline
    best = on_gpus(asked, layout, group[: each * layout.data], model, run)
    if asked.data_parallel_size or not any(_taken(group[: each * layout.data])):
        return best
    for data in range(layout.data - 1, 0, -1):
        found = on_gpus(asked, msgspec.structs.replace(layout, data=data), group[: each * data], model, run)
        if isinstance(found, Candidate) and (
            isinstance(best, NoFit) or (found.useful, found.tokens) > (best.useful, best.tokens)
        ):
            best = found
    return best


def _plan_cpu(asked: Asked, hardware: Hardware, model: Model) -> Plan:
    if hardware.cpu is None:
        raise UsageError("hardware", "neither GPUs nor a CPU are described", "give --hardware, such as H100:1")
    layout = Layout(
        tensor=asked.tensor_parallel_size or 1,
        pipeline=asked.pipeline_parallel_size or 1,
        data=asked.data_parallel_size or 1,
        expert_parallel=bool(asked.enable_expert_parallel),
    )
    batch = batch_of(asked, model, default_batch(None, layout.tensor * layout.pipeline))
    run = run_of(asked, model, batch, None)
    found = on_cpu(asked, layout, hardware.cpu, model, run)
    if isinstance(found, NoFit):
        raise UsageError(f"{model.name} on this CPU", found.why, explain.cpu_remedy(found))
    return _stated(asked, hardware, model, found, ())


# ---- nothing fits


def _nothing_fits(
    asked: Asked, hardware: Hardware, gpus: Sequence[Gpu], model: Model, missed: Sequence[NoFit]
) -> UsageError:
    """The refusal: by how much it does not fit, and the three nearest things that would."""
    counts = ", ".join(f"{len(group)} x {group[0].name}" for group in alike(tuple(gpus)))
    where = f"{model.name} on {counts}"
    sized = [miss for miss in missed if miss.missing is not None]
    if not sized:
        needed = "what was asked for needs more GPUs than one vLLM can have here"
        why = "; ".join(dict.fromkeys(f"{miss.layout.title}: {miss.why}" for miss in missed[:3])) or needed
        return UsageError(where, why, "change what was set, or leave it to the plan")
    nearest = min(sized, key=lambda miss: miss.missing or 0)
    what = f"{nearest.layout.title}: {nearest.why}"
    nothing = "nothing near would: take a smaller model or larger GPUs"
    found = "; or ".join(_would_fit(asked, hardware, gpus, model, max(miss.longest for miss in sized)))
    return UsageError(where, what, f"what would fit: {found}" if found else nothing)


def _would_fit(asked: Asked, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int) -> list[str]:
    """At most three changes that make it fit, nearest first; each has been planned, none is a guess."""
    found: dict[str, str] = {}
    for words, changed, machine in _changes(asked, hardware, gpus, model, longest):
        kind = words.lstrip("0123456789 ")  # two GPUs will do, so nobody needs to hear of four
        if len(found) < NEAREST and kind not in found and _choose(changed, machine, machine.gpus, model)[0]:
            found[kind] = words
    return list(found.values())


def _changes(
    asked: Asked, hardware: Hardware, gpus: Sequence[Gpu], model: Model, longest: int
) -> Iterator[tuple[str, Asked, Hardware]]:
    """What could be changed, in words, as it would be asked, and on which machine; the smallest change first."""
    change = msgspec.structs.replace
    if asked.gpu_memory_utilization is not None:
        yield "no --gpu-memory-utilization", change(asked, gpu_memory_utilization=None), hardware
    if asked.kv_cache_memory_bytes is not None:
        yield "no --kv-cache-memory-bytes", change(asked, kv_cache_memory_bytes=None), hardware
    if longest:
        yield f"--max-model-len {longest}", change(asked, max_model_len=longest), hardware
    if asked.kv_cache_dtype in {None, "auto"} and gpus[0].compute_capability >= (8, 9):
        yield "--kv-cache-dtype fp8", change(asked, kv_cache_dtype="fp8"), hardware
    fp8 = asked.quantization is None and model.quantization is None
    if fp8:
        yield "--quantization fp8", change(asked, quantization="fp8"), hardware
    free = change(asked, tensor_parallel_size=None, pipeline_parallel_size=None, data_parallel_size=None)
    if free != asked:
        yield "no parallel sizes set", free, hardware
    more = [count for count in (2, 4, 8, 16) if count > len(gpus) and not gpus[0].mig_profile]
    for count in more:
        yield f"{count} of these GPUs", free, _more(hardware, gpus[0], count)
    for name in LARGER:
        yield f"{len(gpus)} x {name}", free, parse_hardware_name(f"{name}:{len(gpus)}")
    for count in more if fp8 else ():
        smaller = change(free, quantization="fp8")
        yield f"{count} of these GPUs with --quantization fp8", smaller, _more(hardware, gpus[0], count)


def _more(hardware: Hardware, gpu: Gpu, count: int) -> Hardware:
    """The same machine with ``count`` GPUs like ``gpu``, linked as its first two are."""
    gpus = tuple(msgspec.structs.replace(gpu, index=n, uuid=f"{gpu.uuid}-{n}") for n in range(count))
    linked = bool(hardware.nvlink) and any(hardware.nvlink[0])
    matrix = tuple(tuple(linked and a != b for b in range(count)) for a in range(count))
    return msgspec.structs.replace(hardware, gpus=gpus, nvlink=matrix, p2p=matrix)
