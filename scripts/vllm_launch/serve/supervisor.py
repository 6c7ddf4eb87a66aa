"""Starts vLLM as a child process, watches it, drains it and leaves no process behind.

Touches processes, signals, files and the clock.

Signals: while vLLM serves, SIGTERM, SIGINT or SIGHUP starts the drain, and a second one of them ends vLLM at once.
During start-up there is nothing to drain, so the first one ends vLLM at once. SIGQUIT always ends vLLM at once. Other
signals keep their default behaviour. The exit code is 0 after a drain, and 128 + the signal's number after an end at
once, as in shells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from vllm_health import addresses, gpu_faults, server
from vllm_health.judgement import Transition
from vllm_health.prober import Prober, Surroundings
from vllm_health.scrape import Target
from vllm_launch.errors import UsageError
from vllm_launch.serve import cause, greeting, ports, process, progress, start_history
from vllm_launch.serve.drain import GOOD_ENDS, Drain
from vllm_launch.serve.family import Death, Family
from vllm_launch.serve.log import LOGGER, Log, send_to
from vllm_launch.serve.run_options import Options
from vllm_launch.serve.start_follower import StartFollower

WATCH_SECONDS = 0.5
"""Seconds between two checks that vLLM's known processes are alive."""
SCAN_SECONDS = 5.0
"""Seconds between two searches for new vLLM processes while vLLM serves."""
LOST_SECONDS = 3.0
"""Seconds that vLLM may keep running after one of its processes died. vLLM's own watchdog takes up to 5 s, and never
fires during start-up."""
END_GRACE_SECONDS = 2.0
"""Seconds between SIGTERM and SIGKILL when the launcher ends all processes."""
REAP_SECONDS = 5.0
"""Seconds that the last threads of a killed process may take to end. Their end frees its GPU memory."""
ENGINE_NICENESS = 5
"""Added to the launcher's niceness for the CPU engine. It gives the engine a third of the launcher's CPU weight within
one session or container."""
TERMINATION_LOG_BYTES = 4096  # Kubernetes keeps no more ("Determine the Reason for Pod Failure")
BOTH_SIGNALLED_SECONDS = 0.5
"""Seconds after vLLM's exit in which a signal to the launcher still counts as sent to both at once."""


class Ending(Exception):  # noqa: N818 - an end is not always an error
    """Ends the run. ``code``: the launcher's exit code. ``why``: one sentence, or None if the user sent a signal."""

    def __init__(self, code: int, why: str | None) -> None:
        super().__init__(why)
        self.code, self.why = code, why


async def serve(argv: Sequence[str], env: Mapping[str, str], options: Options) -> int:
    """Run vLLM until it exits or is ended, and return the launcher's exit code. Call it in the main thread.

    Raises:
        UsageError: a port is in use, or the program cannot be executed.
    """
    ports.check(options.api_host, options.api_port, "--port")
    engine = EngineProcess(options)
    view = server.View(lambda: engine.prober.state, options.limits, engine.prober.values, lambda: engine.prober.model)
    try:
        health_server = await server.serve(view, options.health_host, options.health_port)
    except OSError as error:
        raise ports.refused(options.health_port, "--launch-health-port", error) from None
    try:
        engine.start(argv, env)
        return await engine.run_until_exit()
    finally:
        await health_server.close()


class EngineProcess:
    """One run of vLLM, from start to exit. Its process is ``child``, and ``family`` are all of its processes."""

    child: subprocess.Popen[bytes]
    family: Family

    def __init__(self, options: Options) -> None:
        self.options = options
        self.prober = Prober(
            Target(url=options.api_url, api_key=options.probe_key, model=options.served_model_name or None),
            options.limits,
            self._surroundings,
            on_note=lambda note: self.say(f"warning: {note}"),
            planned_kv_tokens=options.planned_kv_tokens,
            planned_gpus=options.planned_gpus,
        )
        self.log = Log()
        send_to(self.log, options.log_format)
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self.ready = asyncio.Event()
        self.startup = StartFollower(
            time.monotonic(),
            start_history.last_phases(options.history_file, options.history_key) if options.history_file else {},
            options.weights_bytes,
            gpu=bool(options.gpu_uuids),
            no_multicast=options.no_multicast,
        )
        self.drain = Drain(
            delay=options.drain_delay,
            shutdown_timeout=options.shutdown_timeout,
            margin=options.exit_margin,
            drain_flag=options.drain_flag,
            refuse_flag=options.refuse_flag,
            say=self.say,
            streams=self.prober.streams,
            cut=lambda: self.log.evidence.cut,
        )
        self._end_reason: str | None = None
        self._gpus = gpu_faults.GpuWatcher(options.gpu_uuids) if options.gpu_uuids else None

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start vLLM.

        Raises:
            UsageError: the program cannot be executed.
        """
        process.become_subreaper()
        self.family = Family(env)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            loop.add_signal_handler(number, self.signals.put_nowait, number)
        try:
            self.child = subprocess.Popen(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # With its own process group, vLLM does not get a terminal's Ctrl-C. vLLM gets no session of its own:
                # Linux schedules each session as a group (autogroup), and vLLM's spinning threads in a separate group
                # would delay the launcher for seconds.
                process_group=0,
            )
        except OSError as error:
            remedy = "install vLLM in the launcher's Python environment"
            raise UsageError(argv[0], f"cannot be executed: {error.strerror}", remedy) from None
        # The CPU engine uses every core, and the launcher must still answer probes and signals. An engine on GPUs uses
        # few cores, and must not wait for other programs on the machine.
        niceness = 0 if self.options.planned_gpus else ENGINE_NICENESS
        os.setpriority(os.PRIO_PROCESS, self.child.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        self._group_guard = process.kill_group_on_exit(self.child.pid)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for stream, target in ((self.child.stdout, 1), (self.child.stderr, 2)):
            assert stream is not None  # noqa: S101 - both are pipes
            self.log.copy(os.dup(stream.fileno()), target)
            stream.close()
        self._reap()

    def say(self, line: str) -> None:
        """Log ``line``. A line that begins with "warning: " has level WARNING, all others have INFO."""
        level = logging.WARNING if line.startswith("warning: ") else logging.INFO
        LOGGER.log(level, line.removeprefix("warning: "))

    async def run_until_exit(self) -> int:
        """Run all tasks at once and return the launcher's exit code. The first task that raises ends the run."""
        tasks = {
            asyncio.create_task(coroutine)
            for coroutine in (
                self._watch_processes(),
                self.prober.run(),
                self._follow_state(),
                self._report_ready(),
                self._handle_signals(),
                self._wait_for_exit(),
            )
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            ending = next(error for task in done if (error := task.exception()) is not None)
            self._end_reason = str(ending) if isinstance(ending, Ending) and ending.why else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_all_processes()
        if not isinstance(ending, Ending):
            raise ending
        if ending.why is not None:
            LOGGER.error(ending.why)
            self._write_termination_log(ending.why)
        self.log.end(timeout=2.0)
        return ending.code

    def _reap(self) -> None:
        statuses = process.reap()
        self.family.reaped(statuses)
        status = statuses.get(self.child.pid)
        if status is not None and not self.exited.done():
            self.child.returncode = status
            self.exited.set_result(status)

    async def _end_all_processes(self) -> None:
        self._end_reason = self._end_reason or "vLLM has exited, or the launcher is stopping it."
        self.prober.judge()
        self.family.close()
        survivors = await asyncio.to_thread(process.end_all, os.getpid(), END_GRACE_SECONDS)
        os.close(self._group_guard)
        for survivor in survivors:
            LOGGER.error(
                "process %d (%s) did not exit within 10 s of SIGKILL: check dmesg, then reset the GPU or reboot",
                survivor.pid,
                survivor.title,
            )
        deadline = time.monotonic() + (0 if survivors else REAP_SECONDS)
        while process.has_children() and time.monotonic() < deadline:
            self._reap()
            await asyncio.sleep(0.02)
        self._reap()
        if self._gpus:
            self._gpus.close()
        await asyncio.to_thread(self.log.close_streams, 5.0)

    def _write_termination_log(self, why: str) -> None:
        path = self.options.termination_log
        if path is None:
            return
        with contextlib.suppress(OSError):  # Kubernetes creates the file; the launcher never does
            handle = os.open(path, os.O_WRONLY | os.O_TRUNC)
            with os.fdopen(handle, "wb") as file:
                file.write(why.encode()[:TERMINATION_LOG_BYTES])

    # --- tasks -------------------------------------------------------------------------------------------------

    async def _wait_for_exit(self) -> None:
        """Raise Ending when vLLM exits. During a drain, the drain does so."""
        status = await self.exited
        death = self.family.first_death()
        await asyncio.to_thread(self.log.close_streams, 1.0)  # its last lines may still be in the pipes
        if status in GOOD_ENDS:
            await asyncio.sleep(BOTH_SIGNALLED_SECONDS)
        if self.drain.begun:
            return
        how = cause.how_it_ended(status)
        if status == 0 and death and not self.log.evidence.asked:
            how = f"exited because {death.title} had died"
        if self._starting:  # a process that died just before vLLM's exit may be noticed just after it
            death = self.family.first_death()
        when = f"in phase '{self.startup.phase}'" if self._starting else "while serving"
        raise Ending(cause.exit_code(status), f"vLLM {how} {when}: {self._why_it_exited(status, death)}")

    @property
    def _starting(self) -> bool:
        return self.startup.phase != "ready"

    def _why_it_exited(self, status: int, death: Death | None) -> str:
        """Return why vLLM exited with ``status``. ``death``: how the first of its processes ended before."""
        if status < 0:
            return cause.why_killed(self.log.evidence, -status)
        died = death.sentence if death else None
        return cause.why_it_exited(self.log.evidence, list(self.log.last), starting=self._starting, died=died)

    async def _watch_processes(self) -> None:
        """Check twice a second that all of vLLM's processes are alive, and follow the start-up.

        Raises Ending when vLLM keeps running for ``LOST_SECONDS`` after one of its processes died.
        """
        died_at: float | None = None
        scanned_at, processes = 0.0, list[process.Process]()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now, starting = time.monotonic(), self._starting
            if starting or now - scanned_at >= SCAN_SECONDS:
                processes = await asyncio.to_thread(process.descendants, os.getpid())
                scanned_at = now
            alive = [member for member in processes if member.state != "Z"]
            self.family.see(alive)
            if (death := self.family.first_death()) and not self.drain.asked_to_end:
                died_at = died_at or now
                if now - died_at > LOST_SECONDS:
                    self._lost(death)
            lines = self.log.take()
            if starting:
                gpu_bytes = self._gpus.report.used if self._gpus and self._gpus.report else 0
                for line in self.startup.follow(lines, alive, gpu_bytes, time.monotonic()):
                    self.say(line)

    def _lost(self, death: Death) -> None:
        """Raise Ending, because vLLM keeps running after the end of one of its processes.

        During a drain, only end its first step: SIGTERM to all processes ends vLLM's engines before its server.
        """
        if self.drain.begun:
            self.say(f"warning: {death.sentence} during the drain")
            self.drain.hurry()
            return
        why = self.log.evidence.cause()
        why = why or (cause.root_cause(list(self.log.last)) if self._starting else None)
        how = "" if death.status is None else f" ({cause.how_it_ended(death.status)})"
        stopped = "vLLM kept running, so the launcher stopped all processes"
        raise Ending(1, f"{death.title} died{how}, but {stopped}. {f'Cause: {why}' if why else cause.NOBODY_SAYS}")

    def _surroundings(self) -> Surroundings:
        """Return what the prober cannot see by itself."""
        start = self.startup
        return Surroundings(
            movement=start.moved,
            phase=start.phase,
            progress=start.sentence(time.monotonic()),
            weights_bytes=self.options.weights_bytes,
            loaded_bytes=start.loaded_bytes,
            remaining_s=start.remaining_s(self.prober.state.phases),
            draining=self.drain.sentence,
            ended=self._end_reason,
            gpus=self._gpus.report if self._gpus else None,
        )

    async def _follow_state(self) -> None:
        """Act on each change of the prober's state. Raises Ending when vLLM is dead."""
        while True:  # awaits nothing else, so that each change takes effect at once
            self._act_on(await self.prober.transitions.get())

    def _act_on(self, change: Transition) -> None:
        now = change.after
        if not change.before.started and now.started:
            self.startup.phase = "ready"
            self.say(f"ready after {now.start_s:.0f} s")
            if self.options.history_file:
                start_history.remember(self.options.history_file, self.options.history_key, now.phases)
            self.ready.set()
            return
        if now.name == "dead" and not self.family.first_death():  # else _watch_processes gives a better reason
            why = self.log.evidence.cause()
            details = f" vLLM's log says: {why}" if why else ""
            raise Ending(1, f"{now.reason} The launcher stopped all processes.{details}")
        if now.name not in {"starting", "draining"}:
            level = logging.INFO if now.name in {"ready", "saturated"} else logging.WARNING
            LOGGER.log(level, "%s: %s", now.name.replace("_", " "), now.reason)

    async def _report_ready(self) -> None:
        """Once vLLM is ready, log its KV cache size against the plan, then print the greeting if the user wants it."""
        await self.ready.wait()
        for engine, tokens in self.prober.engine_metrics.kv_cache_tokens.items():
            text, is_warning = progress.kv_sentence(tokens, self.options.planned_kv_tokens, self.options.kv_tolerance)
            self.say(f"{'warning: ' if is_warning else ''}engine {engine}: {text}")
        if self.options.greet:
            options = self.options
            health_url = f"http://{addresses.reachable(options.health_host)}:{options.health_port}"
            await greeting.greet(
                options.api_url,
                health_url,
                model=options.served_model_name,
                api_key=options.api_key or "",
                say=self.say,
                say_part=self.log.say_part,
            )

    async def _handle_signals(self) -> None:
        """Raise Ending after a signal: the first signal while serving drains vLLM, any other ends it at once."""
        number = await self.signals.get()
        if not self.ready.is_set() or number == signal.SIGQUIT:
            raise Ending(128 + number, None)
        drain = asyncio.create_task(self._end_by_drain(number))
        second_signal = asyncio.create_task(self.signals.get())
        try:
            done, _ = await asyncio.wait({drain, second_signal}, return_when=asyncio.FIRST_COMPLETED)
            if drain in done:
                drain.result()
            raise Ending(128 + second_signal.result(), None)
        finally:
            drain.cancel()
            second_signal.cancel()

    async def _end_by_drain(self, number: signal.Signals) -> None:
        self.drain.begin(number)
        self.prober.judge()  # so that the probes report the drain at once
        code, why = await self.drain.run(self.child.pid, self.exited, self.family.titles)
        if self.exited.done():
            await asyncio.to_thread(self.log.close_streams, 1.0)
            if why:
                why = f"{why}: {self._why_it_exited(self.exited.result(), None)}"
            elif self.drain.early and (error := self.log.evidence.cause()):
                self.say(f"warning: vLLM had an error before the end of the drain: {error}")
        raise Ending(code, why)
