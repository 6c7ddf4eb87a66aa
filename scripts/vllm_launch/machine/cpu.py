"""What the CPU engine may use: cores, NUMA nodes, and the memory that the cgroup leaves. Read from /proc and /sys."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec


class NumaNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One NUMA node. ``cores`` are those of it that we may run on; memory in bytes.

    ``memory_available`` is what vLLM's worker holds the KV cache against (vllm/utils/cpu_resource_utils.py:
    get_memory_node_info), None where nobody has looked.
    """

    index: int
    cores: int
    memory_total: int
    memory_available: int | None = None


class Cpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the CPU engine may use: ``cores`` by affinity and cgroup quota, memory by the cgroup's limit (bytes)."""

    cores: int
    memory_total: int  # the machine's
    memory_limit: int | None  # the cgroup's (v1 or v2), None where there is none
    memory_available: int  # the smaller of what the machine and the cgroup have left
    numa_nodes: tuple[NumaNode, ...] = ()
    amx: bool = False  # Intel's matrix instructions, which vLLM's bfloat16 attention uses where they are


def read_cpu(root: Path = Path("/")) -> Cpu | None:
    """The CPU facts of the machine whose file system is at ``root``; None without /proc (a laptop that is not Linux).

    A cgroup's limit counts for everything below it, so the smallest on the path from our cgroup to the root of the
    mount is ours. A limit at or above the machine's own memory is none. Page cache that the kernel gives back under
    pressure (``inactive_file``) is not counted as used, as the kubelet and `docker stats` do not.
    """
    meminfo = _numbers(root / "proc/meminfo")
    if "MemTotal" not in meminfo:
        return None
    total = meminfo["MemTotal"] * 1024
    allowed = _cpu_set(_field(root / "proc/self/status", "Cpus_allowed_list"))
    quota, limit, available = float("inf"), total, meminfo.get("MemAvailable", meminfo.get("MemFree", 0)) * 1024
    for version, controller, folder in _cgroups(root):
        if controller == "cpu":
            quota = min(quota, _quota(version, folder))
        else:
            bound, used = _memory(version, folder)
            limit, available = min(limit, bound), min(available, max(0, bound - used))
    return Cpu(
        cores=max(1, int(min(len(allowed) or 1, quota))),  # half a core still runs one thread
        memory_total=total,
        memory_limit=limit if limit < total else None,
        memory_available=available,
        numa_nodes=_numa_nodes(root, allowed),
        amx="amx_tile" in _instruction_sets(root).split(),
    )


_Controller = Literal["cpu", "memory"]
_NO_LIMIT = 1 << 62  # v1 writes PAGE_COUNTER_MAX (9223372036854771712) for "no limit"


def read_instruction_sets(root: Path = Path("/")) -> str:
    """A name for what this CPU can run, such as "cpu-5d2a01ff": code compiled here runs where the name is the same."""
    return f"cpu-{zlib.crc32(_instruction_sets(root).encode()):08x}"


def _instruction_sets(root: Path) -> str:
    """The first core's, as the kernel names them, "" where it names none."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)  # x86, ARM
    return found[1] if found else ""


def _cgroups(root: Path) -> Iterator[tuple[int, _Controller, Path]]:
    """(cgroup version, controller, folder) of our cgroup and of all above it that are mounted here.

    Both may be mounted at once (systemd's hybrid layout): v2 then carries no controllers, and its files are not there.
    """
    ours = {}  # a v1 controller's name, or "" for v2 -> path
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        ours.update(dict.fromkeys(controllers.split(","), path))
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")  # proc(5), /proc/pid/mountinfo
        fields, kind = mount.split(), source.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):  # noqa: PLR2004  proc(5)
            continue
        version, names = (2, [""]) if kind[0] == "cgroup2" else (1, kind[2].split(","))
        for name in names:
            if name not in ours or (version == 1 and name not in ("cpu", "memory")):
                continue
            for folder in _upwards(root, mounted=fields[3], at=fields[4], path=ours[name]):
                for controller in ("cpu", "memory") if version == 2 else (name,):  # noqa: PLR2004  cgroup v2
                    yield version, "cpu" if controller == "cpu" else "memory", folder


def _upwards(root: Path, *, mounted: str, at: str, path: str) -> Iterator[Path]:
    """The folders from ours up to the mount point ``at``, which shows the part of the hierarchy under ``mounted``.

    In a container the mount is our own cgroup, though /proc may name it from the host's root or, in a cgroup
    namespace, as "/" or even above ("/../.."); what lies outside the mount cannot be read.
    """
    inside = PurePosixPath(path)
    if ".." in inside.parts:
        inside = PurePosixPath("/")
    elif inside.is_relative_to(mounted):
        inside = PurePosixPath("/", inside.relative_to(mounted))
    mount = root / at.lstrip("/")
    deepest = mount / str(inside).lstrip("/")
    while True:
        yield deepest
        if deepest == mount:
            return
        deepest = deepest.parent


def _quota(version: int, folder: Path) -> float:
    """Cores that the quota allows; infinite without one."""
    if version == 1:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    else:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    try:
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (ValueError, ZeroDivisionError):  # no such file, or "max"
        return float("inf")


def _memory(version: int, folder: Path) -> tuple[int, int]:
    """(limit, bytes used that cannot be given back) of one cgroup; a limit of _NO_LIMIT is none."""
    stat = _numbers(folder / "memory.stat")
    if version == 1:
        # Where the folders above are not mounted, hierarchical_memory_limit still tells their limit.
        limits = [_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used, cache = _number(folder / "memory.usage_in_bytes"), stat.get("total_inactive_file", 0)
    else:
        limits = [_number(folder / "memory.max")]
        used, cache = _number(folder / "memory.current"), stat.get("inactive_file", 0)
    limit = min([bound for bound in limits if bound is not None], default=_NO_LIMIT)
    return min(limit, _NO_LIMIT), max(0, (used or 0) - cache)


_NODE_MEMORY = re.compile(r"(\S+):\s+(\d+) kB")
_FREE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")


def _numa_nodes(root: Path, allowed: frozenset[int]) -> tuple[NumaNode, ...]:
    nodes = []
    for folder in root.glob("sys/devices/system/node/node[0-9]*"):
        cores = len(_cpu_set(_text(folder / "cpulist")) & allowed)
        memory = {name: int(kilobytes) << 10 for name, kilobytes in _NODE_MEMORY.findall(_text(folder / "meminfo"))}
        if cores and "MemTotal" in memory:  # a node without cores is a GPU's or CXL memory
            index, free = int(folder.name.removeprefix("node")), [memory[name] for name in _FREE if name in memory]
            available = sum(free) if len(free) == len(_FREE) else None
            nodes.append(
                NumaNode(index=index, cores=cores, memory_total=memory["MemTotal"], memory_available=available)
            )
    return tuple(sorted(nodes, key=lambda node: node.index))


def _cpu_set(text: str) -> frozenset[int]:
    """The kernel's list format, "0-3,8"."""
    spans = [span.partition("-") for span in text.strip().split(",") if span.strip()]
    return frozenset(core for first, _, last in spans for core in range(int(first), int(last or first) + 1))


def _field(path: Path, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*)$", _text(path), re.MULTILINE)
    return found[1] if found else ""


def _numbers(path: Path) -> dict[str, int]:
    """``name value`` or ``name: value kB`` lines."""
    return {name: int(value) for name, value in re.findall(r"^([^\s:]+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """The file's text, "" where it is not there or not ours to read: every one of these files is optional."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
