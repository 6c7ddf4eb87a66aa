#!/usr/bin/env python3
"""Throughput and latency through the OpenAI API: this launcher's plan against vLLM's defaults and other splits.

``python benchmarks/gpu/throughput.py --tokenizer FOLDER --out FILE`` needs vLLM and idle GPUs. Every configuration is
started, warmed up and measured in one run (the load: bench_serve.py), one after another, or with ``--at-once`` all
beside each other on GPUs of their own, each measurement at the same time, or with ``--in-turns`` all on the same GPUs,
loaded in turns, so that whatever else a shared host does meets all alike. Flags that are none of this command's go to
every server. tok/s are output tokens; times are milliseconds; ``preemptions``: requests put out of the batch for want
of cache, computed again; ``page_faults``: ``bench.page_faults`` during the load; ``gpu_busy`` and ``watts``:
``bench.sample_gpu_load``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
import bench_serve
import configurations
import msgspec
from configurations import CONFIGURATIONS, Configuration
from result import Result, gpu_names

FAILURES = (bench.ServerFailedError, OSError, RuntimeError)
"""Of a server or a load; a broken barrier is a RuntimeError too."""


def reason(error: Exception) -> str:
    """For a row; a broken barrier has no text."""
    return (str(error) or repr(error))[-2000:]


class Server(msgspec.Struct, frozen=True):
    """A configuration that runs: its ``ports``, its ``gpus`` by NVML's index, and what all of its rows say.

    ``sessions`` are the ids of its processes' sessions.
    """

    ports: list[int]
    sessions: list[int]
    gpus: list[int]
    row: dict[str, Any]


def started(
    name: str, this: Configuration, options: argparse.Namespace, model: Path, stack: contextlib.ExitStack,
    *, first: int | None, place: int = 0,
) -> Server:  # fmt: skip
    """Start one configuration until it answers; ``stack`` ends it.

    ``first`` is its first GPU, None where there is none; ``place`` keeps its ports from those of others.
    """
    command = configurations.COMMANDS[this.command]
    began, share = time.monotonic(), this.gpus // this.servers
    ports = [bench.PORT + 100 * place + 10 * number for number in range(this.servers)]
    logs = [options.out.parent / "logs" / f"{name}-{number}.log" for number in range(this.servers)]
    gpus = [] if first is None else [*range(first, first + this.gpus)]
    processes = []
    for number, port in enumerate(ports):
        mine = gpus[number * share : (number + 1) * share]
        env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))} if mine else {}
        server = bench.start_process(
            command(model, this.flags, port), logs[number], port=port, env=bench.environment() | env
        )
        processes.append(stack.enter_context(server))
    for process, port, log in zip(processes, ports, logs, strict=True):
        bench.wait_for(process, port, log, 420)
    ready = round(time.monotonic() - began, 1)
    row = {"configuration": name, "gpus": this.gpus, "flags": list(this.flags), "ready_s": ready}
    row["utilization"] = bench.utilization(ports[0])
    row["kv_tokens"] = [tokens for port in ports for tokens in bench.kv_cache_tokens(port)]
    return Server(ports, [process.pid for process in processes], gpus, row)


def warm_up(server: Server, model: Path) -> None:
    """Some requests, whose answers nobody counts."""
    gpus = server.row["gpus"]
    workload, clients = bench_serve.WORKLOADS["512/256"], bench_serve.CLIENTS_PER_GPU * gpus
    bench_serve.measure(model, server.ports, workload, requests=64 * gpus, rate=float("inf"), clients=clients, seed=9)


class Load(msgspec.Struct, frozen=True):
    """``requests`` of a workload, ``rate`` of them a second."""

    workload: str
    rate: float
    requests: int


def loads(options: argparse.Namespace, gpus: int) -> Iterator[Load]:
    """What is to be measured, for all ``gpus`` together."""
    for workload in options.workload or bench_serve.WORKLOADS:
        what = bench_serve.WORKLOADS[workload]
        below = [] if options.saturation_only else [rate * gpus for rate in what.rates]
        for rate in options.rate or [float("inf"), *below]:
            all_at_once = rate == float("inf")
            requests = what.requests * gpus * options.share if all_at_once else rate * options.seconds
            yield Load(workload, rate, round(requests))


def row_of(server: Server, model: Path, load: Load, seed: int) -> dict[str, Any]:
    """One measurement. ``seed`` is its own, or the prefix cache knows its prompts."""
    before, faults = sum(map(bench.preemptions, server.ports)), sum(map(bench.page_faults, server.sessions))
    with bench.sample_gpu_load(server.gpus) as gpus:
        row = bench_serve.measure(
            model,
            server.ports,
            bench_serve.WORKLOADS[load.workload],
            requests=load.requests,
            rate=load.rate,
            clients=bench_serve.CLIENTS_PER_GPU * server.row["gpus"],
            seed=seed,
        )
    row["preemptions"] = sum(map(bench.preemptions, server.ports)) - before
    row["page_faults"] = sum(map(bench.page_faults, server.sessions)) - faults
    return server.row | {"workload": load.workload} | row | gpus


def run(
    name: str,
    this: Configuration,
    options: argparse.Namespace,
    model: Path,
    add: Callable[..., None],
    *,
    first: int | None,
    together: Callable[[], object] = lambda: None,
) -> None:
    """Start one configuration, measure what was asked for, end it; before each ``together`` waits for the others."""
    with contextlib.ExitStack() as stack:
        server = started(name, this, options, model, stack, first=first, place=first or 0)
        together()
        warm_up(server, model)
        for seed, load in enumerate(loads(options, this.gpus), 10):
            together()
            add(**row_of(server, model, load, seed))


def in_turns(
    chosen: Mapping[str, Configuration],
    options: argparse.Namespace,
    model: Path,
    add: Callable[..., None],
    *,
    gpus: bool,
) -> None:
    """All of ``chosen`` on the same GPUs, loaded one after another and again: a host that slows down slows all down.

    Each needs a share of a GPU's memory in its flags. They are started one after another, since vLLM measures memory.
    """
    with contextlib.ExitStack() as stack:
        servers = []
        for place, (name, this) in enumerate(chosen.items()):
            servers.append(started(name, this, options, model, stack, first=0 if gpus else None, place=place))
        for server in servers:
            warm_up(server, model)
        seeds = itertools.count(10)
        for load in loads(options, servers[0].row["gpus"]):
            rows: list[list[dict[str, Any]]] = [[] for _ in servers]
            for turn in range(options.in_turns):  # to and fro, so that nobody is always the first
                for number in range(len(servers))[:: 1 if turn % 2 == 0 else -1]:
                    rows[number].append(row_of(servers[number], model, load, next(seeds)))
            for mine in rows:
                add(**median(mine))


def median(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for those of the same load: medians, all that completed or failed, and the range of the median ITL."""
    told = dict(rows[0]) | {"turns": len(rows)}
    told |= {name: sum(row[name] for row in rows) for name in ("completed", "failed")}
    for name in ("seconds", "output_tok_s", "preemptions", "page_faults", "gpu_busy", "watts"):
        if found := [row[name] for row in rows if name in row]:
            told[name] = round(statistics.median(found), 3)
    for name in ("ttft_ms", "itl_ms"):
        told[name] = {cut: round(statistics.median(row[name][cut] for row in rows), 2) for cut in rows[0][name]}
    middles = [row["itl_ms"]["p50"] for row in rows]
    told["itl_range"] = f"{min(middles):.1f}-{max(middles):.1f}"
    return told


def run_or_tell(
    name: str, this: Configuration, options: argparse.Namespace, model: Path, add: Callable[..., None], **where: Any
) -> bool:
    """Whether ``run`` went well; if not, a row says why."""
    try:
        run(name, this, options, model, add, **where)
    except FAILURES as error:
        add(configuration=name, flags=list(this.flags), error=reason(error))
        return False
    return True


def at_once(chosen: Mapping[str, Configuration], options: argparse.Namespace, model: Path, result: Result) -> bool:
    """All of ``chosen`` beside each other: a process for each, which begins a measurement when all others do."""
    fork = multiprocessing.get_context("fork")
    barrier, told = fork.Barrier(len(chosen), timeout=600), fork.SimpleQueue()

    def beside(name: str, this: Configuration, first: int) -> None:
        def add(**row: Any) -> None:
            told.put(row)

        try:
            if not run_or_tell(name, this, options, model, add, first=first, together=barrier.wait):
                barrier.abort()
        finally:
            told.put(None)

    processes, first = [], 0
    good, running = True, len(chosen)
    try:
        for name, this in chosen.items():
            process = fork.Process(target=beside, args=(name, this, first))
            process.start()
            processes.append(process)
            first += this.gpus
        while running:
            row = told.get()
            running -= row is None
            if row:
                result.add(**row)
                good &= "error" not in row
    finally:  # a signal: they end their servers
        for process in processes:
            process.terminate()
            process.join()
    return good


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--configuration", action="append", choices=list(CONFIGURATIONS))
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME={plan,vllm,forked} FLAGS", help="another, on one GPU"
    )
    parser.add_argument("--workload", action="append", choices=list(bench_serve.WORKLOADS))
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate", type=float, action="append", help="only this, of all GPUs together; inf: every request at once"
    )
    rates.add_argument("--saturation-only", action="store_true", help="no rates below it, as --rate inf")
    parser.add_argument("--at-once", action="store_true", help="the configurations beside each other")
    parser.add_argument(
        "--in-turns", type=int, default=0, metavar="TURNS",
        help="all on the same GPUs, loaded in turns so many times; each needs a share of a GPU's memory in its flags",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20, help="of requests at a rate")
    parser.add_argument("--share", type=float, default=1, help="of the requests at saturation, to try things out")
    options, flags = parser.parse_known_args()
    widths = {CONFIGURATIONS[name].gpus for name in options.configuration or ()} | ({1} if options.also else set())
    if options.in_turns < 0 or (options.in_turns and (options.at_once or len(widths) > 1)):
        parser.error("--in-turns takes a number of turns, servers of as many GPUs each, and not --at-once beside it")
    try:
        also = configurations.parse(options.also, used_names=options.configuration or ())
    except ValueError as error:
        parser.error(str(error))
    gpus = len(gpu_names())
    names = options.configuration or [
        name for name, this in CONFIGURATIONS.items() if this.gpus <= (1 if options.in_turns else gpus)
    ]
    chosen = {name: CONFIGURATIONS[name] for name in names if not (also and not options.configuration)} | also
    chosen = {name: msgspec.structs.replace(this, flags=(*this.flags, *flags)) for name, this in chosen.items()}
    if options.at_once and (needed := sum(this.gpus for this in chosen.values())) > gpus > 0:
        parser.error(f"--at-once: {', '.join(chosen)} need {needed} GPUs together, and here are {gpus}: name fewer")
    result = Result(options.out, "throughput")
    with tempfile.TemporaryDirectory() as folder:
        model = bench.model_folder(options.shape, options.tokenizer, Path(folder))
        if options.at_once:
            return int(not at_once(chosen, options, model, result))
        if options.in_turns:
            try:
                in_turns(chosen, options, model, result.add, gpus=gpus > 0)
            except FAILURES as error:
                result.add(configuration=", ".join(chosen), error=reason(error))
                return 1
            return 0
        first = 0 if gpus else None
        good = [run_or_tell(name, this, options, model, result.add, first=first) for name, this in chosen.items()]
    return int(not all(good))


if __name__ == "__main__":
    bench.run(main)
