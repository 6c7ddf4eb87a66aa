"""Combinations of parallel sizes that vLLM refuses for every model."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_launch.settings.mistake import Engine, Mistake, number, table


def _flag(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


def _experts(engine: Engine) -> Iterator[Mistake]:
    """Load balancing of experts (config/parallel.py:ParallelConfig._validate_parallel_config)."""
    names = ("tensor_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    if (
        engine.get("enable_eplb")
        and all(number(engine, name, 1) == 1 for name in names if name in engine)
        and any(name in engine for name in names)
    ):
        problem = "load balancing of experts needs more than one GPU"
        yield Mistake(
            "enable_eplb", problem, "raise --tensor-parallel-size or --data-parallel-size, or remove --enable-eplb"
        )
    redundant = table(engine, "eplb_config").get("num_redundant_experts")
    if redundant and not engine.get("enable_eplb"):
        yield Mistake("eplb_config", "num_redundant_experts has an effect only with --enable-eplb", "add --enable-eplb")


def _context(engine: Engine) -> Iterator[Mistake]:
    """Context parallelism (config/parallel.py:ParallelConfig._validate_parallel_config)."""
    tensor, dest = number(engine, "tensor_parallel_size", 1), "decode_context_parallel_size"
    prefill, decode = number(engine, "prefill_context_parallel_size", 1), number(engine, dest, 1)
    if prefill == 1 and tensor % decode:
        problem = f"{dest} {decode} does not divide tensor_parallel_size {tensor}"
        remedy = f"set --tensor-parallel-size to a multiple of {decode}, or remove --decode-context-parallel-size"
        yield Mistake(dest, problem, remedy)
    if prefill > 1 and decode not in {1, prefill, tensor * prefill}:
        sizes = ", ".join(map(str, sorted({1, prefill, tensor * prefill})))
        problem = f"{dest} is {decode}, but with prefill_context_parallel_size {prefill} vLLM takes only {sizes}"
        yield Mistake(dest, problem, "give one of these numbers")


def _nodes(engine: Engine) -> Iterator[Mistake]:
    """Several machines (engine/arg_utils.py:create_engine_config)."""
    nodes, rank = number(engine, "nnodes", 1), number(engine, "node_rank", 0)
    if nodes == 1:
        return
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    world = 1
    for size in sizes:
        world *= number(engine, size, 1)
    if world % nodes:
        sizes_set = f"the product of the parallel sizes that you set ({world})"
        problem = f"the launcher plans for one machine, and {sizes_set} is not a multiple of nnodes {nodes}"
        remedy = "for several machines set all parallel sizes yourself, or run vllm serve without the launcher"
        yield Mistake("nnodes", problem, remedy)
    if not 0 <= rank < nodes:
        yield Mistake(
            "node_rank", f"node_rank is {rank}, and {nodes} nodes have ranks 0 to {nodes - 1}", "give one of these"
        )
    if engine.get("data_parallel_backend") not in {None, "mp"}:
        yield Mistake("data_parallel_backend", "with nnodes vLLM takes only mp", "remove --data-parallel-backend")


def _replicas(engine: Engine) -> Iterator[Mistake]:
    """Replicas on several machines, and who balances the load (engine/arg_utils.py:create_engine_config)."""
    replicas, local = number(engine, "data_parallel_size", 1), engine.get("data_parallel_size_local")
    rank = engine.get("data_parallel_rank")
    external, hybrid = engine.get("data_parallel_external_lb"), engine.get("data_parallel_hybrid_lb")
    if isinstance(local, int) and local > replicas:
        problem = f"data_parallel_size_local {local} is more than data_parallel_size {replicas}"
        remedy = "lower --data-parallel-size-local, or raise --data-parallel-size"
        yield Mistake("data_parallel_size_local", problem, remedy)
    if replicas == 1 and (external or rank is not None):
        dest = "data_parallel_external_lb" if rank is None else "data_parallel_rank"
        remedy = f"set --data-parallel-size too, or remove {_flag(dest)}"
        yield Mistake(dest, f"{dest} needs a data_parallel_size above 1", remedy)
    if isinstance(rank, int) and not 0 <= rank < replicas:
        problem = f"data_parallel_rank is {rank}, and {replicas} replicas have ranks 0 to {replicas - 1}"
        yield Mistake("data_parallel_rank", problem, "set --data-parallel-size too, or another rank")
    modes = [
        dest
        for dest, given in (
            ("data_parallel_multi_port_external_lb", engine.get("data_parallel_multi_port_external_lb")),
            ("data_parallel_external_lb", external or rank is not None),
            ("data_parallel_hybrid_lb", hybrid or engine.get("data_parallel_start_rank") is not None),
        )
        if given
    ]
    if len(modes) > 1:
        names = " and ".join(modes)
        yield Mistake(modes[1], f"vLLM takes one kind of load balancing, not {names}", "keep one of them")
    elif external and rank is None and number(engine, "nnodes", 1) == 1:
        problem = "vLLM must know which replica it is"
        yield Mistake(
            "data_parallel_external_lb", problem, "add --data-parallel-rank, or remove --data-parallel-external-lb"
        )
    elif hybrid and local is None:
        problem = "vLLM must know how many replicas run on this machine"
        yield Mistake(
            "data_parallel_hybrid_lb", problem, "add --data-parallel-size-local, or remove --data-parallel-hybrid-lb"
        )
    if (external or rank is not None) and local not in {None, 1}:
        problem = "with a data_parallel_rank each vLLM runs one replica"
        yield Mistake("data_parallel_size_local", problem, "set --data-parallel-size-local to 1, or remove it")
    if engine.get("enable_fault_tolerance") and not external and rank is None:
        problem = "fault tolerance needs an external load balancer"
        yield Mistake("enable_fault_tolerance", problem, "add --data-parallel-rank, or remove --enable-fault-tolerance")


def _one_process(engine: Engine) -> Iterator[Mistake]:
    """The executor without workers (engine/arg_utils.py:_check_feature_supported, v1/executor/uniproc_executor.py)."""
    if engine.get("distributed_executor_backend") != "uni":
        return
    for dest in ("pipeline_parallel_size", "tensor_parallel_size"):
        if number(engine, dest, 1) > 1:
            yield Mistake("distributed_executor_backend", f"uni runs one process, and {dest} needs more", "use mp")


RULES = (_experts, _context, _nodes, _replicas, _one_process)
"""Rules in the order of their checks."""
