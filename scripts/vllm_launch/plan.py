"""Decides how vLLM should run: a pure function from what was asked, the hardware and the model to a Plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from vllm_launch import memory, parallel
from vllm_launch.errors import UsageError
from vllm_launch.gpus import Gpu, Hardware
from vllm_launch.kv import kv_cache, longest_that_fits
from vllm_launch.memory import KvCache, Memory, Run
from vllm_launch.model import Model
from vllm_launch.parallel import Layout

Objective = Literal["throughput", "latency"]

USEFUL_REQUESTS = 16
USEFUL_TOKENS = 2048
"""A KV cache is useful when it holds one request of the whole ``max_model_len``, without which vLLM refuses to start,
and 16 requests of 2,048 tokens. With fewer streams than that a GPU spends its time reading weights, and one more GPU
in the replica serves more than a replica of its own on that GPU."""

SMALLER_BATCHES = ((2048, 256), (2048, 64), (512, 16))
"""(max_num_batched_tokens, max_num_seqs) to try in turn when vLLM's defaults leave no room: both cost activation memory."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the person set of vLLM's own arguments, under vLLM's names; None where they left it to the plan.

    Values are taken as given; the rest is computed around them. The launcher's own wishes come in too.
    """

    objective: Objective = "throughput"
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None  # -1 is vLLM's "auto": the longest that fits
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str | None = None
    block_size: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    enable_expert_parallel: bool = False
    language_model_only: bool = False
    max_cudagraph_capture_size: int | None = None
    long_max_model_len: bool = False  # VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 or --hf-overrides: the person knows better


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why one value is what it is. ``source``: "you", "model", "hardware", "vLLM 0.32.0" or a rule of ours."""

    field: str
    value: object
    why: str
    source: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was considered and not taken, such as "TP=3", and why."""

    plan: str
    why: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to run. As JSON this is a contract (``plan --format json``)."""

    model: str
    objective: Objective
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    gpus: int  # per replica; 0 on the CPU engine
    gpu_memory_utilization: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache: KvCache
    memory: Memory
    argv: list[str]
    env: dict[str, str]
    reasons: list[Reason]
    rejected: list[Rejected]
    warnings: list[str]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A layout on certain GPUs, worked out. ``kv_cache`` per replica, ``memory`` of the tightest GPU."""

    layout: Layout
    gpus: tuple[Gpu, ...]
    run: Run
    memory: Memory
    utilization: float
    kv_cache: KvCache
    useful: bool

    @property
    def tokens(self) -> int:
        """KV tokens of all replicas together."""
        return self.kv_cache.tokens * self.layout.data


class NoFit(msgspec.Struct, frozen=True, kw_only=True):
    """Why a layout cannot be. ``missing`` is by how many bytes a GPU is too small, None when size is not the reason."""

    layout: Layout
    why: str
    missing: int | None = None
    fits_tokens: int = 0  # the longest single request that would fit


def plan(asked: Asked, hardware: Hardware, model: Model) -> Plan:
    """How to run ``model`` on ``hardware``; ``argv`` is empty, ``command`` fills it in.

    Raises:
        UsageError: nothing that was asked for fits, or vLLM would refuse it; the text says what would fit.
    """
    if asked.max_model_len is not None and asked.max_model_len > model.max_model_len and not asked.long_max_model_len:
        raise UsageError(
            f"max_model_len {asked.max_model_len}",
            f"the model itself is made for {model.max_model_len} tokens and vLLM refuses more",
            "lower it, or set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if the model is known to hold up",
        )
    if not hardware.gpus:
        return _plan_cpu(asked, hardware, model)
    kept: list[Candidate] = []
    refused: list[NoFit] = []
    for group in _groups(asked, hardware.gpus):
        found = _best(asked, group, hardware, model, refused)
        if found:
            kept.append(found)
    if not kept:
        raise _nothing_fits(asked, hardware, model, refused)
    best = max(kept, key=lambda c: (c.useful, c.tokens))
    return _decided(asked, hardware, model, best, refused)


def _groups(asked: Asked, gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """Sets of GPUs that one vLLM may span, each with the emptiest GPU first.

    One utilisation and one number of blocks hold for every GPU of a vLLM, so unlike GPUs are mixed only where what was
    asked for needs more GPUs than there are alike. A process sees one MIG slice at most (NVIDIA MIG User Guide, "CUDA
    device enumeration"), so a slice is a group of its own.
    """
    if any(gpu.mig_profile for gpu in gpus):
        return [(gpu,) for gpu in gpus if gpu.mig_profile]
    alike: dict[tuple[object, ...], list[Gpu]] = {}
    for gpu in sorted(gpus, key=lambda g: (-g.memory_free, g.index)):
        alike.setdefault((gpu.name, gpu.memory_total, gpu.compute_capability), []).append(gpu)
    groups = [tuple(group) for group in alike.values()]
    needed = (asked.tensor_parallel_size or 1) * (asked.pipeline_parallel_size or 1) * (asked.data_parallel_size or 1)
    if needed > max(len(group) for group in groups):
        return [tuple(sorted(gpus, key=lambda g: (-g.memory_free, g.index)))]
    return groups


def _layouts(asked: Asked, group: Sequence[Gpu], *, linked: bool) -> Iterator[Layout]:
    """Splits of one replica over ``group``, best first for the objective; ``data`` is how many replicas fit there.

    Over PCIe alone a pipeline moves far less than tensor parallelism does, which is what vLLM's documentation advises
    there ("Parallelism and Scaling", on GPUs without NVLink); for latency only tensor parallelism helps.
    """
    most = len(group)
    tensors = [asked.tensor_parallel_size] if asked.tensor_parallel_size else range(1, most + 1)
    pipelines = [asked.pipeline_parallel_size] if asked.pipeline_parallel_size else range(1, most + 1)
    splits = [(tensor, pipeline) for tensor in tensors for pipeline in pipelines if tensor * pipeline <= most]
    if asked.objective == "latency":
        splits.sort(key=lambda split: (split[1], -split[0]))
    else:
        splits.sort(key=lambda split: (split[0] * split[1], split[1] if linked else split[0]))
    for tensor, pipeline in splits:
        data = asked.data_parallel_size or most // (tensor * pipeline)
        if tensor * pipeline * data <= most:
            yield Layout(
                tensor=tensor, pipeline=pipeline, data=data, expert_parallel=asked.enable_expert_parallel
            )


def _best(
    asked: Asked, group: Sequence[Gpu], hardware: Hardware, model: Model, refused: list[NoFit]
) -> Candidate | None:
    """The first useful layout on ``group``; where none is, the one with the largest cache; None where nothing fits."""
    batch = memory.default_batch(group[0])
    default = (asked.max_num_batched_tokens or batch[0], asked.max_num_seqs or batch[1])
    linked = _linked(hardware, group)
    for tokens, seqs in (default, *SMALLER_BATCHES):
        run = _run(asked, model, min(tokens, default[0]), min(seqs, default[1]))
        fallback: Candidate | None = None
        misses: list[NoFit] = []
        for layout in _layouts(asked, group, linked=linked):
            found = _spread(asked, layout, group, model, run)
            if isinstance(found, NoFit):
                misses.append(found)
            elif found.useful:
                refused.extend(misses)
                return found
            else:
                misses.append(_not_useful(found))
                if fallback is None or (found.run.max_model_len, found.tokens) > (
                    fallback.run.max_model_len,
                    fallback.tokens,
                ):
                    fallback = found
        if fallback is not None:
            refused.extend(miss for miss in misses if miss.layout != fallback.layout)
            return fallback
        if not refused:
            refused.extend(misses)
        if asked.max_num_batched_tokens and asked.max_num_seqs:
            break
    return None


def _spread(asked: Asked, layout: Layout, group: Sequence[Gpu], model: Model, run: Run) -> Candidate | NoFit:
    """Work ``layout`` out with as many replicas as give the most tokens: a GPU that is half taken drags all down."""
    per_replica = layout.tensor * layout.pipeline
    found = _evaluate(asked, layout, group[: per_replica * layout.data], model, run)
    uneven = group[0].memory_free - group[per_replica * layout.data - 1].memory_free > 0.02 * group[0].memory_total
    if asked.data_parallel_size or not uneven:
        return found
    for data in range(layout.data - 1, 0, -1):
        fewer = _evaluate(
            asked, msgspec.structs.replace(layout, data=data), group[: per_replica * data], model, run
        )
        if isinstance(fewer, Candidate) and (
            isinstance(found, NoFit) or (fewer.useful, fewer.tokens) > (found.useful, found.tokens)
        ):
            found = fewer
    return found


def _evaluate(asked: Asked, layout: Layout, gpus: Sequence[Gpu], model: Model, run: Run) -> Candidate | NoFit:
    problems = parallel.problems(model, run, layout, gpus)
    if problems:
        return NoFit(layout=layout, why="; ".join(problems))
    gpu = min(gpus, key=lambda g: (g.memory_free, g.memory_total))
    parts = memory.of_gpu(model, run, layout, gpu)
    utilization = asked.gpu_memory_utilization or memory.safe_utilization(parts, gpu)
    if asked.gpu_memory_utilization is not None:
        over = memory.requested(gpu, utilization) - (gpu.memory_free - parts.context)
        if over > 0:
            return NoFit(
                layout=layout,
                why=f"gpu_memory_utilization {utilization} of GPU {gpu.index} is {gib(over)} more than is free there",
                missing=over,
            )
    left = asked.kv_cache_memory_bytes or memory.kv_bytes(parts, gpu, utilization)
    if left <= 0:
        why = f"without any KV cache {gib(-left)} are missing on each GPU (weights alone take {gib(parts.weights)})"
        return NoFit(layout=layout, why=why, missing=max(-left, 1))
    longest = longest_that_fits(model, run, layout, left, gpu)
    if longest < run.max_model_len:
        pinned = asked.max_model_len not in {None, -1}
        if pinned or longest < min(USEFUL_TOKENS, run.max_model_len):
            short = kv_cache(model, run, layout, left, gpu)
            return NoFit(
                layout=layout,
                why=f"{gib(left)} of KV cache hold a request of {longest:,} tokens, not of {run.max_model_len:,}",
                missing=max(run.max_model_len * short.bytes_per_token // (layout.tensor * layout.pipeline) - left, 1),
                fits_tokens=longest,
            )
        run = msgspec.structs.replace(run, max_model_len=longest)
    cache = kv_cache(model, run, layout, left, gpu)
    own = asked.max_model_len if asked.max_model_len not in {None, -1} else model.max_model_len
    useful = not cache.bytes_per_token or (
        run.max_model_len == own and cache.tokens >= USEFUL_REQUESTS * min(USEFUL_TOKENS, run.max_model_len)
    )
    return Candidate(
        layout=layout,
        gpus=tuple(gpus),
        run=run,
        memory=parts,
        utilization=utilization,
        kv_cache=cache,
        useful=useful,
    )


def _run(asked: Asked, model: Model, tokens: int, seqs: int) -> Run:
    return Run(
        max_model_len=asked.max_model_len if asked.max_model_len not in {None, -1} else model.max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        kv_cache_dtype=asked.kv_cache_dtype or "auto",
        block_size=asked.block_size,
        enforce_eager=asked.enforce_eager,
        max_cudagraph_capture_size=asked.max_cudagraph_capture_size,
        language_model_only=asked.language_model_only,
        quantization=asked.quantization,
        dtype=asked.dtype,
    )


def _linked(hardware: Hardware, gpus: Sequence[Gpu]) -> bool:
    """Whether NVLink joins every pair of ``gpus``; alone, a GPU is as good as linked."""
    place = {gpu.uuid: row for row, gpu in enumerate(hardware.gpus)}
    rows = [place[gpu.uuid] for gpu in gpus]
    return all(a == b or (bool(hardware.nvlink) and hardware.nvlink[a][b]) for a in rows for b in rows)


def _not_useful(found: Candidate) -> NoFit:
    cut = "" if found.kv_cache.tokens >= USEFUL_REQUESTS * USEFUL_TOKENS else f", under {USEFUL_REQUESTS}x{USEFUL_TOKENS:,}"
    return NoFit(
        layout=found.layout,
        why=f"a KV cache of {found.kv_cache.tokens:,} tokens{cut}, max_model_len {found.run.max_model_len:,}",
        fits_tokens=found.run.max_model_len,
    )


def _nothing_fits(asked: Asked, hardware: Hardware, model: Model, refused: Sequence[NoFit]) -> UsageError:
    """The refusal: by how much it does not fit, and the three nearest things that would."""
    sized = [miss for miss in refused if miss.missing is not None]
    where = f"{model.name} on {len(hardware.gpus)} x {hardware.gpus[0].name}"
    if not sized:
        why = refused[0].why if refused else "what was asked for needs more GPUs than there are"
        return UsageError(where, why, "change what was set, or leave it to the plan")
    nearest = min(sized, key=lambda miss: miss.missing or 0)
    what = f"{_title(nearest.layout)}: {nearest.why}: {gib(nearest.missing or 0)} too much for each GPU"
    return UsageError(where, what, "what would fit: " + ("; or ".join(_would_fit(asked, hardware, model, nearest)) or
                      "nothing near: take a smaller model or larger GPUs"))


def _would_fit(asked: Asked, hardware: Hardware, model: Model, nearest: NoFit) -> list[str]:
    """At most three changes that make it fit, nearest first; each has been planned, none is a guess."""

    def fits(changed: Asked, machine: Hardware) -> bool:
        return any(_best(changed, group, machine, model, []) for group in _groups(changed, machine.gpus))

    found = []
    if nearest.fits_tokens:
        found.append(f"--max-model-len {nearest.fits_tokens}")
    change = msgspec.structs.replace
    gpu = hardware.gpus[0]
    if asked.kv_cache_dtype in {None, "auto"} and gpu.compute_capability >= (8, 9):
        if fits(change(asked, kv_cache_dtype="fp8"), hardware):
            found.append("--kv-cache-dtype fp8")
    if asked.quantization is None and model.quantization is None and gpu.compute_capability >= (8, 0):
        if fits(change(asked, quantization="fp8"), hardware):
            found.append("--quantization fp8 (weights of one byte)")
    if asked.gpu_memory_utilization is not None and fits(change(asked, gpu_memory_utilization=None), hardware):
        found.append("leaving --gpu-memory-utilization to the plan")
    free = change(asked, tensor_parallel_size=None, pipeline_parallel_size=None, data_parallel_size=None)
    if free != asked and fits(free, hardware):
        found.append("leaving the parallel sizes to the plan")
    for count in (2, 4, 8, 16):
        if count > len(hardware.gpus) and not gpu.mig_profile and fits(free, _more(hardware, count)):
            found.append(f"{count} of these GPUs")
            break
    return found[:3]


def _more(hardware: Hardware, count: int) -> Hardware:
    """The same machine with ``count`` GPUs like its first, linked as its first two are."""
    first = hardware.gpus[0]
    gpus = tuple(msgspec.structs.replace(first, index=n, uuid=f"{first.uuid}-{n}") for n in range(count))
    linked = bool(hardware.nvlink) and any(hardware.nvlink[0])
    matrix = tuple(tuple(linked and a != b for b in range(count)) for a in range(count))
    return msgspec.structs.replace(hardware, gpus=gpus, nvlink=matrix, p2p=matrix)
