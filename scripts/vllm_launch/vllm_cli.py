"""vLLM's command, with room for every Python call below it.

CPython keeps frames in chunks of 16 KiB: it maps a new one for the first call that no longer fits, and unmaps it when
that call returns. Where a loop's calls lie on such an edge each of them does so (python/cpython#142183; 3.13 and 3.14
keep one since 2026-03, 3.12 and older do not). A forked engine, below all of its parent's frames, did it some 200 times
for a prompt, and first tokens came later by a fifth (docs/performance.md, "Forked processes"). A frame that claims most
of a larger chunk leaves the rest of it to all calls below, in forked processes too.

It runs in vLLM's own process, and imports nothing but vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

SLOTS = 40_000
"""What the frame claims, of 8 bytes each. CPython doubles 16 KiB until they and 1,000 more fit (Python/pystate.c:
push_chunk), which is 512 KiB here, so 200 KiB are left, 13 chunks; untouched, the claimed ones cost no memory."""


def main() -> None:
    """``vllm``'s console script (pyproject.toml of vLLM: ``vllm.entrypoints.cli.main:main``)."""
    import vllm.entrypoints.cli.main as cli  # noqa: PLC0415, TID251 - what this exists for

    command: Callable[[], None] = cli.main
    command()


main.__code__ = main.__code__.replace(co_stacksize=SLOTS)

if __name__ == "__main__":
    main()
