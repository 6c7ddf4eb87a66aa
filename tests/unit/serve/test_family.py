"""The processes of one vLLM, with real processes under vLLM's titles."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from vllm_launch.serve import process
from vllm_launch.serve.family import PREFIX_VARIABLE, Death, Family


async def start(title, seconds=60):
    """Start a process with this title. Its name comes from ``exec -a``."""
    child = await asyncio.create_subprocess_exec("bash", "-c", 'exec -a "$0" sleep "$1"', title, str(seconds))
    return child, await until_its_title_begins_with(title, child.pid)


async def until_its_title_begins_with(title, pid):
    for _ in range(500):
        if (found := process.read_process(pid)) and found.title.startswith(title):
            return found
        await asyncio.sleep(0.01)
    raise TimeoutError


def watched(title, env):
    """Return the death that a family sees when a process with this title is killed, or None."""

    async def watch():
        family = Family(env)
        child, found = await start(title)
        try:
            family.see([found])
            assert family.first_death() is None
        finally:
            child.kill()
            await child.wait()
        await asyncio.sleep(0.05)
        death = family.first_death()
        family.close()
        return death

    return asyncio.run(watch())


@pytest.mark.parametrize("prefix", ["VLLM", "llama-3.1-8b", "team.a", "a (b) [c]*", "with space", "ä"])
@pytest.mark.parametrize("kind", ["EngineCore", "EngineCore_DP1", "Worker_TP0", "APIServer_2", "DPCoordinator"])
def test_a_dead_process_is_noticed_with_any_prefix_of_its_title(prefix, kind):
    death = watched(f"{prefix}::{kind}", {PREFIX_VARIABLE: prefix})
    assert death
    assert death.title == f"{prefix}::{kind} 60"


def test_the_prefix_of_vllm_is_known_without_the_variable():
    assert watched("VLLM::EngineCore", {})
    assert watched("::EngineCore", {PREFIX_VARIABLE: ""})


@pytest.mark.parametrize("title", ["bash -c VLLM::EngineCore", "other::EngineCore", "VLLM::Other", "VLLMx::EngineCore"])
def test_a_process_of_somebody_else_is_not_vllms(title):
    assert watched(title, {}) is None


def test_the_end_of_a_process_has_its_signal_or_exit_code():
    async def ends():
        family = Family({})
        (first, found), (second, other) = [await start(f"VLLM::Worker_TP{rank}") for rank in range(2)]
        family.see([found, other])
        family.reaped({second.pid: -signal.SIGKILL, 1: 0})
        family.reaped({first.pid: 3})
        for child in (first, second):
            child.kill()
            await child.wait()
        family.close()
        return family.first_death()

    death = asyncio.run(ends())
    assert death == Death("VLLM::Worker_TP1 60", -signal.SIGKILL)
    assert death.sentence == "VLLM::Worker_TP1 60 was killed by SIGKILL"
    assert Death("VLLM::EngineCore", 3).sentence == "VLLM::EngineCore exited with status 3"
    assert Death("VLLM::EngineCore", None).sentence == "VLLM::EngineCore vanished"


def test_the_status_of_a_process_that_nobody_has_reaped_is_read_from_proc():
    async def unreaped():
        parent = await asyncio.create_subprocess_exec(
            "bash", "-c", "(exec -a VLLM::EngineCore sleep 60) & echo $!; exec sleep 60", stdout=asyncio.subprocess.PIPE
        )
        pid = int(await parent.stdout.readline())
        found = await until_its_title_begins_with("VLLM::EngineCore", pid)
        family = Family({})
        family.see([found])
        try:
            os.kill(pid, signal.SIGILL)
            await asyncio.sleep(0.2)
            return family.first_death()
        finally:
            family.close()
            parent.kill()
            await parent.wait()

    assert asyncio.run(unreaped()).status == -signal.SIGILL
