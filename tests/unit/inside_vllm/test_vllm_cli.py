"""The vLLM command that the launcher starts on GPUs: its calls never map and unmap a stack chunk repeatedly."""

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
    edges = [depth for depth in range(1500) if at(depth) >= {CALLS}]
    print(json.dumps([sys.argv[1:], edges]), flush=True)

if __name__ == "__main__":
    main()
"""
"""Stand-in for vLLM. It prints its arguments and the stack depths at which every call causes a page fault."""


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
        arguments, depths = json.loads(done.stdout)
        assert arguments == [*words]  # vLLM's command receives all arguments
        return depths

    return run


@pytest.mark.parametrize("words", [(), ("forked",)], ids=["itself", "forked"])
def test_no_depth_of_vllms_stack_has_a_page_fault_for_every_call(edges, words):
    if sys.version_info < (3, 13):  # newer versions may keep a chunk
        assert edges("vllm.entrypoints.cli.main", *words)  # the fault exists without vllm_cli
    assert edges("vllm_launch.inside_vllm.vllm_cli", *words) == []
