"""vLLM's command, with room for every Python call below it.

CPython keeps a thread's frames in chunks of 16 KiB: it maps a new one for the first call that no longer fits, and
unmaps it when that call returns. Where a loop's calls lie on such an edge each of them does so (python/cpython#142183;
3.14 keeps one since 3.14.4, 3.12 and older do not). A forked engine, below all of its parent's frames, did it some 200
times for a prompt, and first tokens came a fifth later (docs/performance.md, "Forked processes"). A frame that claims
half of a larger chunk leaves the other half to all calls below it: in this process's main thread, and in that of each
process that forks from it. Other threads and spawned processes have stacks of their own.

It runs in vLLM's own process, and imports nothing but vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

SLOTS = 32_000
"""What the frame claims, of 8 bytes each. CPython doubles 16 KiB until they and 1,000 more fit (Python/pystate.c:
push_chunk): 512 KiB, of which 260 KiB are left, 16 chunks. Untouched, those that are claimed cost no memory."""


def main() -> None:
    """``vllm``'s console script (pyproject.toml of vLLM: ``vllm.entrypoints.cli.main:main``)."""
    import vllm.entrypoints.cli.main as cli  # noqa: PLC0415, TID251 - what this exists for

    command: Callable[[], None] = cli.main
    command()


main.__code__ = main.__code__.replace(co_stacksize=SLOTS)

if __name__ == "__main__":
    main()
