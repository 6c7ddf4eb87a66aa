"""What the launcher starts on GPUs: vLLM's command, whose calls never map a chunk of Python's stack again and again."""

import json
import subprocess
import sys

import pytest

CALLS = 500

COMMAND = f"""
import json, os, resource, sys

def call():
    pass

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({CALLS}):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def at(depth):
    return at(depth - 1) if depth else faults()

def main():
    sys.setrecursionlimit(3000)
    if sys.argv[1:] == ["forked"] and (child := os.fork()):
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    found = [depth for depth in range(1500) if at(depth) >= {CALLS}]
    print(json.dumps([sys.argv[1:], found]), flush=True)

if __name__ == "__main__":
    main()
"""
"""Stands in for vLLM: says at which depths every call costs a page."""


@pytest.fixture
def edges(tmp_path):
    folder = tmp_path / "vllm/entrypoints/cli"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "main.py").write_text(COMMAND)

    def run(module, *words):
        argv = [sys.executable, "-m", module, *words]
        done = subprocess.run(argv, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, check=True, timeout=60)
        told, found = json.loads(done.stdout)
        assert told == [*words]  # what is said to vLLM's command reaches it
        return found

    return run


@pytest.mark.parametrize("words", [(), ("forked",)], ids=["itself", "forked"])
def test_no_call_of_vllms_maps_memory_at_any_depth(edges, words):
    if sys.version_info < (3, 13):  # newer ones may keep a chunk
        assert edges("vllm.entrypoints.cli.main", *words)  # so this would be seen
    assert edges("vllm_launch.inside_vllm.vllm_cli", *words) == []
