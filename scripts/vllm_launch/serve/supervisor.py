"""vLLM as a child: started, watched, drained, and nothing left behind. Touches processes, signals, files and the clock.

Signals: SIGTERM, SIGINT and SIGHUP drain, a second one of any of them ends at once; during the start there is nothing
to drain, so the first one ends at once. SIGQUIT always ends at once. An end that was asked for and drained is exit 0;
one at once is 128 + the signal's number, as shells have it. Other signals are not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vllm_health import addresses, gpu_faults, server
from vllm_health.limits import Limits
from vllm_health.prober import Prober, Surroundings
from vllm_health.scrape import Target
from vllm_health.state import Transition
from vllm_launch.errors import UsageError
from vllm_launch.serve import greeting, ports, process, progress, start_history
from vllm_launch.serve.drain import Drain
from vllm_launch.serve.log import LOGGER, Log, send_to
from vllm_launch.serve.start_follower import StartFollower

WATCH_SECONDS = 0.5
SCAN_SECONDS = 5.0
"""Between two looks for new processes of vLLM while it serves; known ones are checked every ``WATCH_SECONDS``."""
LOST_SECONDS = 3.0
"""Seconds that vLLM may keep running after one of its processes died. vLLM's own watchdog takes up to 5 s, and never
fires during start-up."""
END_GRACE_SECONDS = 2.0
REAP_SECONDS = 5.0
"""Time for the last threads of a killed process to end, which frees its GPU memory."""
ENGINE_NICENESS = 5
"""Added to our own niceness for the CPU engine: a third of our weight within one session or container."""
TERMINATION_LOG_BYTES = 4096  # Kubernetes keeps no more ("Determine the Reason for Pod Failure")
_VITAL = re.compile(r"\w+::(EngineCore|Worker|APIServer|DPCoordinator)")  # vllm/utils/system_utils.py:set_process_title


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What ``serve`` needs beside the child's argv and environment; durations in seconds."""

    api_host: str  # "" is every address
    api_port: int
    api_url: str  # the API as this machine reaches it
    health_host: str
    health_port: int
    drain_flag: Path  # this and the next four: as ``drain.Drain`` has them
    refuse_flag: Path
    drain_delay: float
    shutdown_timeout: float
    exit_margin: float
    limits: Limits = Limits()
    starts: Path | None = None  # file that keeps how long starts took (``start_history``)
    start_key: str = ""  # of starts like this one, in that file
    gpu_uuids: tuple[str, ...] = ()
    termination_log: Path | None = None
    planned_kv_tokens: int | None = None
    planned_gpus: int | None = None
    no_multicast: bool = False  # NVLink multicast must stay unused
    kv_tolerance: float = 0.05
    weights_bytes: int | None = None
    log_format: str = "text"
    greet: bool = False
    served_model_name: str = ""
    api_key: str | None = None  # a client's, for the greeting
    probe_key: str | None = None  # the prober's own


class Ending(Exception):  # noqa: N818 - an end is not always an error
    """Ends the run. ``code``: the launcher's exit code. ``why``: one sentence, or None if the user asked for it."""

    def __init__(self, code: int, why: str | None) -> None:
        super().__init__(why)
        self.code, self.why = code, why


async def serve(argv: Sequence[str], env: Mapping[str, str], options: Options) -> int:
    """Run vLLM until it ends or is ended, and return the launcher's exit code. Must be called in the main thread.

    Raises:
        UsageError: a port that is taken, a program that cannot be executed.
    """
    ports.check(options.api_host, options.api_port, "--port")
    run = _Run(options)
    view = server.View(lambda: run.prober.state, options.limits, run.prober.values, lambda: run.prober.model)
    try:
        listening = await server.serve(view, options.health_host, options.health_port)
    except OSError as error:
        raise ports.refused(options.health_port, "--launch-health-port", error) from None
    try:
        run.start(argv, env)
        return await run.until_the_end()
    finally:
        await listening.close()


class _Run:
    """One run of the vLLM process, from start to exit."""

    child: subprocess.Popen[bytes]

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
            start_history.usual(options.starts, options.start_key) if options.starts else {},
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
        )
        self.vital: dict[int, str] = {}
        self._ended: str | None = None
        self._gpus = gpu_faults.GpuWatcher(options.gpu_uuids) if options.gpu_uuids else None

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start vLLM. Raises UsageError: it cannot be executed."""
        process.become_subreaper()
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
                # A terminal's Ctrl-C reaches us alone. No session of its own: to Linux each is a scheduling group
                # (autogroup), and one full of vLLM's yielding spinners starves the others, us, for seconds.
                process_group=0,
            )
        except OSError as error:
            raise UsageError(argv[0], f"cannot be executed: {error.strerror}", "install the engine with it") from None
        # Probes are answered, and signals obeyed, while the CPU engine takes every core there is. One that feeds a GPU
        # does not, and must not wait behind whatever else runs beside it.
        niceness = 0 if self.options.planned_gpus else ENGINE_NICENESS
        os.setpriority(os.PRIO_PROCESS, self.child.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        self._will = process.last_will(self.child.pid)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for stream, target in ((self.child.stdout, 1), (self.child.stderr, 2)):
            assert stream is not None  # noqa: S101 - both are pipes
            self.log.copy(os.dup(stream.fileno()), target)
            stream.close()
        self._reap()

    def say(self, line: str) -> None:
        """Log ``line``; one that begins with "warning: " is a warning."""
        level = logging.WARNING if line.startswith("warning: ") else logging.INFO
        LOGGER.log(level, line.removeprefix("warning: "))

    async def until_the_end(self) -> int:
        """Run all duties at once and return the launcher's exit code. The first duty that raises ends the run."""
        duties = {
            asyncio.create_task(duty)
            for duty in (
                self._watch(),
                self.prober.run(),
                self._follow_state(),
                self._serve(),
                self._obey(),
                self._outlive(),
            )
        }
        try:
            done, _ = await asyncio.wait(duties, return_when=asyncio.FIRST_EXCEPTION)
            ending = next(error for task in done if (error := task.exception()) is not None)
            self._ended = str(ending) if isinstance(ending, Ending) and ending.why else None
        finally:
            for duty in duties:
                duty.cancel()
            await asyncio.gather(*duties, return_exceptions=True)
            await self._end_everything()
        if not isinstance(ending, Ending):
            raise ending
        if ending.why is not None:
            LOGGER.error(ending.why)
            self._tell_kubernetes(ending.why)
        self.log.end(timeout=2.0)
        return ending.code

    def _reap(self) -> None:
        status = process.reap().get(self.child.pid)
        if status is not None and not self.exited.done():
            self.child.returncode = status
            self.exited.set_result(status)

    async def _end_everything(self) -> None:
        self._ended = self._ended or "vLLM has ended."
        self.prober.judge()
        left = await asyncio.to_thread(process.end_all, os.getpid(), END_GRACE_SECONDS)
        os.close(self._will)
        for one in left:
            LOGGER.error("process %d (%s) does not end: it hangs in the kernel", one.pid, one.title)
        deadline = time.monotonic() + (0 if left else REAP_SECONDS)
        while process.has_children() and time.monotonic() < deadline:
            self._reap()
            await asyncio.sleep(0.02)
        self._reap()
        if self._gpus:
            self._gpus.close()
        await asyncio.to_thread(self.log.close_streams, 5.0)

    def _tell_kubernetes(self, why: str) -> None:
        path = self.options.termination_log
        if path is None:
            return
        with contextlib.suppress(OSError):  # there only in a pod: never made by us
            handle = os.open(path, os.O_WRONLY | os.O_TRUNC)
            with os.fdopen(handle, "wb") as file:
                file.write(why.encode()[:TERMINATION_LOG_BYTES])

    # --- duties -------------------------------------------------------------------------------------------------

    async def _outlive(self) -> None:
        """Raise Ending when vLLM exits although nobody asked it to."""
        status = await self.exited
        if self.drain.asked_to_end:
            return
        await asyncio.to_thread(self.log.close_streams, 1.0)  # its last words may still be on their way
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        if status == 0 and self.vital_lost():
            how = f"exited because {self.vital_lost()} had died"
        why = progress.reason(list(self.log.last)) or "its log names no error"
        when = f"in phase '{self.startup.phase}'" if self.startup.phase != "ready" else "while serving"
        raise Ending(progress.exit_code(status), f"vLLM {how} {when}: {why}")

    def vital_lost(self) -> str | None:
        """Return the title of one of vLLM's processes that has died, or None."""
        return next((title for pid, title in self.vital.items() if not process.is_alive(pid)), None)

    async def _watch(self) -> None:
        """Check twice a second that all of vLLM's processes live, and follow the start."""
        lost_at: float | None = None
        scanned, found = 0.0, list[process.Process]()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now, starting = time.monotonic(), not self.ready.is_set()
            if starting or now - scanned >= SCAN_SECONDS:
                found = await asyncio.to_thread(process.descendants, os.getpid())
                scanned = now
            alive = [one for one in found if one.state != "Z"]
            self.vital.update({one.pid: one.title for one in alive if _VITAL.match(one.title)})
            if (title := self.vital_lost()) and not self.drain.asked_to_end:
                lost_at = lost_at or now
                if now - lost_at > LOST_SECONDS:
                    why = progress.root_cause(list(self.log.last))
                    why = why or "its log gives no cause; perhaps it was killed for want of memory"
                    raise Ending(1, f"{title} died and vLLM lived on, so all was ended: {why}")
            lines = self.log.take()
            if starting:
                used = self._gpus.report.used if self._gpus and self._gpus.report else 0
                for line in self.startup.follow(lines, alive, used, time.monotonic()):
                    self.say(line)

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
            ended=self._ended,
            gpus=self._gpus.report if self._gpus else None,
        )

    async def _follow_state(self) -> None:
        """Act on each verdict of the prober. Raises Ending when vLLM is dead."""
        while True:  # and await nothing else, so that each verdict takes effect at once
            self._act_on(await self.prober.transitions.get())

    def _act_on(self, change: Transition) -> None:
        now = change.after
        if not change.before.started and now.started:
            self.startup.phase = "ready"
            self.say(f"ready after {now.start_s:.0f} s")
            if self.options.starts:
                start_history.remember(self.options.starts, self.options.start_key, now.phases)
            self.ready.set()
            return
        if now.name == "dead" and not self.vital_lost():  # of a part that is gone its watch knows more
            cause = progress.root_cause(list(self.log.last))
            raise Ending(1, f"{now.reason} All was ended{f': {cause}' if cause else '.'}")
        if now.name not in {"starting", "draining"}:
            level = logging.INFO if now.name in {"ready", "saturated"} else logging.WARNING
            LOGGER.log(level, "%s: %s", now.name.replace("_", " "), now.reason)

    async def _serve(self) -> None:
        """Once vLLM is ready, compare its KV cache with the plan, and greet."""
        await self.ready.wait()
        for engine, tokens in self.prober.engine_metrics.kv_cache_tokens.items():
            text, far_off = progress.kv_sentence(tokens, self.options.planned_kv_tokens, self.options.kv_tolerance)
            self.say(f"{'warning: ' if far_off else ''}engine {engine}: {text}")
        if self.options.greet:
            options = self.options
            health = f"http://{addresses.reachable(options.health_host)}:{options.health_port}"
            await greeting.greet(
                options.api_url,
                health,
                model=options.served_model_name,
                api_key=options.api_key or "",
                say=self.say,
                say_part=self.log.say_part,
            )

    async def _obey(self) -> None:
        """End the run by signals: the first one while serving drains, any other ends at once."""
        number = await self.signals.get()
        if not self.ready.is_set() or number == signal.SIGQUIT:
            raise Ending(128 + number, None)
        drain = asyncio.create_task(self._end_by_drain(number))
        again = asyncio.create_task(self.signals.get())
        try:
            done, _ = await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
            if drain in done:
                drain.result()
            raise Ending(128 + again.result(), None)
        finally:
            drain.cancel()
            again.cancel()

    async def _end_by_drain(self, number: signal.Signals) -> None:
        self.drain.begin(number)
        self.prober.judge()  # so that the probes say so at once
        raise Ending(*await self.drain.run(self.child.pid, self.exited, self.vital))
