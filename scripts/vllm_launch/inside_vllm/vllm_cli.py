"""vLLM's command, started with enough stack memory for all Python calls below it.

CPython keeps a thread's frames in chunks of 16 KiB. It maps a new chunk for the first call that does not fit, and
unmaps it when that call returns. If the calls of a loop lie at the end of a chunk, each of them maps and unmaps one
(python/cpython#142183; 3.14 keeps one chunk from 3.14.4 on, 3.12 and older do not). A forked engine, which runs below
all frames of its parent, did this about 200 times per prompt, and TTFT rose by a fifth (docs/performance.md, "Forked
processes"). A frame that claims half of a larger chunk leaves the other half to all calls below it. This holds for the
main thread of this process and of each process that forks from it. Other threads and spawned processes have their own
stacks.

It runs in vLLM's own process and imports only vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

SLOTS = 32_000
"""Slots of 8 bytes that the frame claims. CPython doubles 16 KiB until these and 1,000 more fit (Python/pystate.c:
push_chunk): 512 KiB, of which 260 KiB (16 chunks) are left. The claimed slots are never touched and cost no memory."""


def main() -> None:
    """Run the ``vllm`` console script (pyproject.toml of vLLM: ``vllm.entrypoints.cli.main:main``)."""
    import vllm.entrypoints.cli.main as cli  # noqa: PLC0415, TID251 - this file runs vLLM

    command: Callable[[], None] = cli.main
    command()


main.__code__ = main.__code__.replace(co_stacksize=SLOTS)

if __name__ == "__main__":
    main()
