"""Decides how vLLM should run: a pure function from what was asked, the hardware and the model to a Plan."""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_launch.memory import KvCache, Memory

Objective = Literal["throughput", "latency"]


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
