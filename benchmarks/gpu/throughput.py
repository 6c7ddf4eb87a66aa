#!/usr/bin/env python3
"""Measure throughput and latency through the OpenAI API: the launcher's plan, vLLM's defaults, and other splits.

``python benchmarks/gpu/throughput.py --tokenizer FOLDER --out FILE`` needs vLLM and idle GPUs. It starts, warms up and
measures each configuration (load: bench_serve.py), one after another. With ``--at-once`` all run side by side on GPUs
of their own, and each measurement runs at the same time. With ``--in-turns`` all run on the same GPUs and get the load
in turns, so that other work on a shared host disturbs all equally. Unknown flags go to every server. ``output_tok_s``
counts output tokens. Times are milliseconds. ``page_faults``: ``bench.page_faults`` during the load. ``gpu_busy`` and
``watts``: ``bench.sample_gpu_load``.
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
"""Errors of a server or a load. A broken barrier is a RuntimeError too."""


def reason(error: Exception) -> str:
    """Return the text of ``error`` for a row, or its repr: a broken barrier has no text."""
    return (str(error) or repr(error))[-2000:]


class Server(msgspec.Struct, frozen=True):
    """A running configuration.

    ``sessions``: session ids of its processes. ``gpus``: NVML's indices. ``row``: the values that all of its rows
    share.
    """

    ports: list[int]
    sessions: list[int]
    gpus: list[int]
    row: dict[str, Any]


def start_servers(
    name: str, configuration: Configuration, options: argparse.Namespace, model: Path, stack: contextlib.ExitStack,
    *, first_gpu: int | None, port_offset: int = 0,
) -> Server:  # fmt: skip
    """Start the servers of one configuration and wait until they answer. ``stack`` stops them.

    ``first_gpu``: index of its first GPU, None on a machine without GPUs. ``port_offset``: a number of its own, so that
    its ports differ from those of other configurations.
    """
    command = configurations.COMMANDS[configuration.command]
    began, gpus_per_server = time.monotonic(), configuration.gpus // configuration.servers
    ports = [bench.PORT + 100 * port_offset + 10 * number for number in range(configuration.servers)]
    logs = [options.out.parent / "logs" / f"{name}-{number}.log" for number in range(configuration.servers)]
    gpus = [] if first_gpu is None else [*range(first_gpu, first_gpu + configuration.gpus)]
    processes = []
    for number, port in enumerate(ports):
        own_gpus = gpus[number * gpus_per_server : (number + 1) * gpus_per_server]
        env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own_gpus))} if own_gpus else {}
        server = bench.start_process(
            command(model, configuration.flags, port), logs[number], port=port, env=bench.environment() | env
        )
        processes.append(stack.enter_context(server))
    for process, port, log in zip(processes, ports, logs, strict=True):
        bench.wait_for(process, port, log, 420)
    ready = round(time.monotonic() - began, 1)
    row = {"configuration": name, "gpus": configuration.gpus, "flags": list(configuration.flags), "ready_s": ready}
    row["utilization"] = bench.utilization(ports[0])
    row["kv_tokens"] = [tokens for port in ports for tokens in bench.kv_cache_tokens(port)]
    return Server(ports, [process.pid for process in processes], gpus, row)


def warm_up(server: Server, model: Path) -> None:
    """Send some requests that are not part of a measurement."""
    gpus = server.row["gpus"]
    workload, clients = bench_serve.WORKLOADS["512/256"], bench_serve.CLIENTS_PER_GPU * gpus
    bench_serve.measure(model, server.ports, workload, requests=64 * gpus, rate=float("inf"), clients=clients, seed=9)


class Load(msgspec.Struct, frozen=True):
    """One measurement: ``requests`` of a workload, ``rate`` per second."""

    workload: str
    rate: float
    requests: int


def loads(options: argparse.Namespace, gpus: int) -> Iterator[Load]:
    """Yield the loads to measure, for all ``gpus`` together."""
    for name in options.workload or bench_serve.WORKLOADS:
        workload = bench_serve.WORKLOADS[name]
        below = [] if options.saturation_only else [rate * gpus for rate in workload.rates]
        for rate in options.rate or [float("inf"), *below]:
            all_at_once = rate == float("inf")
            requests = workload.requests * gpus * options.share if all_at_once else rate * options.seconds
            yield Load(name, rate, round(requests))


def measure_row(server: Server, model: Path, load: Load, seed: int) -> dict[str, Any]:
    """Measure one load and return its row. With a ``seed`` used before, the prefix cache would know the prompts."""
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
    configuration: Configuration,
    options: argparse.Namespace,
    model: Path,
    add: Callable[..., None],
    *,
    first_gpu: int | None,
    wait_for_others: Callable[[], object] = lambda: None,
) -> None:
    """Start one configuration, measure its loads, and stop it. Call ``wait_for_others`` before each measurement."""
    with contextlib.ExitStack() as stack:
        server = start_servers(
            name, configuration, options, model, stack, first_gpu=first_gpu, port_offset=first_gpu or 0
        )
        wait_for_others()
        warm_up(server, model)
        for seed, load in enumerate(loads(options, configuration.gpus), 10):
            wait_for_others()
            add(**measure_row(server, model, load, seed))


def in_turns(
    chosen: Mapping[str, Configuration],
    options: argparse.Namespace,
    model: Path,
    add: Callable[..., None],
    *,
    gpus: bool,
) -> None:
    """Run all of ``chosen`` on the same GPUs, load them in turns, and add a row of medians per load.

    A host that slows down then slows all of them down. The flags of each must limit its share of a GPU's memory. The
    servers start one after another, because vLLM measures free memory.
    """
    with contextlib.ExitStack() as stack:
        servers = []
        for port_offset, (name, configuration) in enumerate(chosen.items()):
            servers.append(
                start_servers(
                    name, configuration, options, model, stack, first_gpu=0 if gpus else None, port_offset=port_offset
                )
            )
        for server in servers:
            warm_up(server, model)
        seeds = itertools.count(10)
        for load in loads(options, servers[0].row["gpus"]):
            rows: list[list[dict[str, Any]]] = [[] for _ in servers]
            for turn in range(options.in_turns):  # alternate the order, so that no server is always the first
                for number in range(len(servers))[:: 1 if turn % 2 == 0 else -1]:
                    rows[number].append(measure_row(servers[number], model, load, next(seeds)))
            for server_rows in rows:
                add(**median(server_rows))


def median(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row for several rows of one load: medians, sums of ``completed`` and ``failed``, range of the ITL."""
    result = dict(rows[0]) | {"turns": len(rows)}
    result |= {name: sum(row[name] for row in rows) for name in ("completed", "failed")}
    for name in ("seconds", "output_tok_s", "preemptions", "page_faults", "gpu_busy", "watts"):
        if values := [row[name] for row in rows if name in row]:
            result[name] = round(statistics.median(values), 3)
    for name in ("ttft_ms", "itl_ms"):
        result[name] = {cut: round(statistics.median(row[name][cut] for row in rows), 2) for cut in rows[0][name]}
    itl_medians = [row["itl_ms"]["p50"] for row in rows]
    result["itl_range"] = f"{min(itl_medians):.1f}-{max(itl_medians):.1f}"
    return result


def run_or_report(
    name: str,
    configuration: Configuration,
    options: argparse.Namespace,
    model: Path,
    add: Callable[..., None],
    **place: Any,
) -> bool:
    """Run a configuration and return whether it succeeded. If not, add a row with the reason."""
    try:
        run(name, configuration, options, model, add, **place)
    except FAILURES as error:
        add(configuration=name, flags=list(configuration.flags), error=reason(error))
        return False
    return True


def at_once(chosen: Mapping[str, Configuration], options: argparse.Namespace, model: Path, result: Result) -> bool:
    """Run all of ``chosen`` side by side, measure at the same times, and return whether all succeeded."""
    fork = multiprocessing.get_context("fork")
    barrier, rows = fork.Barrier(len(chosen), timeout=600), fork.SimpleQueue()

    def run_process(name: str, configuration: Configuration, first_gpu: int) -> None:
        def add(**row: Any) -> None:
            rows.put(row)

        try:
            if not run_or_report(
                name, configuration, options, model, add, first_gpu=first_gpu, wait_for_others=barrier.wait
            ):
                barrier.abort()
        finally:
            rows.put(None)

    processes, first_gpu = [], 0
    good, running = True, len(chosen)
    try:
        for name, configuration in chosen.items():
            process = fork.Process(target=run_process, args=(name, configuration, first_gpu))
            process.start()
            processes.append(process)
            first_gpu += configuration.gpus
        while running:
            row = rows.get()
            running -= row is None
            if row:
                result.add(**row)
                good &= "error" not in row
    finally:  # after a signal the processes stop their servers
        for process in processes:
            process.terminate()
            process.join()
    return good


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--configuration", action="append", choices=list(CONFIGURATIONS))
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME={plan,vllm,forked} FLAGS",
        help="one more configuration, on one GPU",
    )
    parser.add_argument("--workload", action="append", choices=list(bench_serve.WORKLOADS))
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate",
        type=float,
        action="append",
        help="measure only this rate, requests/s of all GPUs together; inf: all at once",
    )
    rates.add_argument(
        "--saturation-only", action="store_true", help="measure no rates below saturation, as --rate inf"
    )
    parser.add_argument("--at-once", action="store_true", help="run the configurations side by side")
    parser.add_argument(
        "--in-turns", type=int, default=0, metavar="TURNS",
        help="run all on the same GPUs and load them in turns; limit each one's share of GPU memory in its flags",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20, help="seconds of requests at a rate")
    parser.add_argument(
        "--share", type=float, default=1, help="share of the requests at saturation; small values give quick runs"
    )
    options, flags = parser.parse_known_args()
    gpu_counts = {CONFIGURATIONS[name].gpus for name in options.configuration or ()} | ({1} if options.also else set())
    if options.in_turns < 0 or (options.in_turns and (options.at_once or len(gpu_counts) > 1)):
        parser.error(
            "--in-turns needs a positive number and configurations with equal GPU counts, and excludes --at-once"
        )
    try:
        also = configurations.parse(options.also, used_names=options.configuration or ())
    except ValueError as error:
        parser.error(str(error))
    gpus = len(gpu_names())
    names = options.configuration or [
        name
        for name, configuration in CONFIGURATIONS.items()
        if configuration.gpus <= (1 if options.in_turns else gpus)
    ]
    chosen = {name: CONFIGURATIONS[name] for name in names if not (also and not options.configuration)} | also
    chosen = {
        name: msgspec.structs.replace(configuration, flags=(*configuration.flags, *flags))
        for name, configuration in chosen.items()
    }
    if options.at_once and (needed := sum(configuration.gpus for configuration in chosen.values())) > gpus > 0:
        parser.error(
            f"--at-once: {', '.join(chosen)} need {needed} GPUs together, and this machine has {gpus}: choose fewer"
        )
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
        first_gpu = 0 if gpus else None
        good = [
            run_or_report(name, configuration, options, model, result.add, first_gpu=first_gpu)
            for name, configuration in chosen.items()
        ]
    return int(not all(good))


if __name__ == "__main__":
    bench.run(main)
