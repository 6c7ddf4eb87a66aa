"""Watches the processes of one vLLM by their titles, and notes how each one ends. Touches /proc.

vLLM gives each process a title, "VLLM::EngineCore". The variable VLLM_PROCESS_NAME_PREFIX replaces "VLLM".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial

import msgspec

from vllm_launch.serve import cause, process

PREFIX_VARIABLE = "VLLM_PROCESS_NAME_PREFIX"
"""Source: vllm/envs.py, vllm/utils/system_utils.py:set_process_title."""
DEFAULT_PREFIX = "VLLM"


class Death(msgspec.Struct, frozen=True):
    """The end of one process. ``status``: its exit status as in subprocess, or None if nobody saw it."""

    title: str
    status: int | None

    @property
    def sentence(self) -> str:
        """The end in words, without a full stop."""
        return f"{self.title} {'vanished' if self.status is None else cause.how_it_ended(self.status)}"


class Family:
    """The processes of one vLLM. ``titles`` has every one that was ever seen, by pid."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """``env``: vLLM's environment."""
        prefix = env.get(PREFIX_VARIABLE, DEFAULT_PREFIX).lstrip()
        self._title = re.compile(rf"{re.escape(prefix)}::(EngineCore|Worker|APIServer|DPCoordinator)")
        self.titles: dict[int, str] = {}
        self._deaths: dict[int, Death] = {}
        self._handles: dict[int, int] = {}

    def see(self, alive: Iterable[process.Process]) -> None:
        """Note the processes of vLLM among ``alive``."""
        for member in alive:
            if self._title.match(member.title):
                self.titles[member.pid] = member.title
                if member.pid not in self._handles and member.pid not in self._deaths:
                    self._follow(member.pid)

    def _follow(self, pid: int) -> None:
        """Be called when ``pid`` ends. Its parent, vLLM, may reap it soon after."""
        with contextlib.suppress(OSError):  # it has ended, or too many files are open: ``first_death`` notices
            handle = os.pidfd_open(pid)
            self._handles[pid] = handle
            asyncio.get_running_loop().add_reader(handle, partial(self._ended, pid))

    def _ended(self, pid: int) -> None:
        self._release(pid)
        self._deaths.setdefault(pid, Death(self.titles[pid], process.exit_status(pid)))

    def _release(self, pid: int) -> None:
        if (handle := self._handles.pop(pid, None)) is not None:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)

    def reaped(self, statuses: Mapping[int, int]) -> None:
        """Note exit statuses, by pid, of processes that the launcher itself reaped."""
        for pid, status in statuses.items():
            if pid in self.titles:
                self._deaths[pid] = Death(self.titles[pid], status)

    def first_death(self) -> Death | None:
        """Return the end of the process that ended first, or None if all are alive."""
        for pid in self.titles:
            if pid not in self._deaths and not process.is_alive(pid):
                self._ended(pid)
        return next(iter(self._deaths.values()), None)

    def close(self) -> None:
        """Follow no process any more."""
        for pid in list(self._handles):
            self._release(pid)
