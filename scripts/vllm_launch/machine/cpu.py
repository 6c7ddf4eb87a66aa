"""Reads the cores, NUMA nodes and memory that vLLM may use on the CPU, from /proc, /sys and cgroups."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec


class NumaNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One NUMA node. ``cores`` counts the node's cores that this process may use. Memory is in bytes.

    ``memory_available``: vLLM's worker compares the size of the KV cache with it (vllm/utils/cpu_resource_utils.py:
    get_memory_node_info). It is None if it is unknown.
    """

    index: int
    cores: int
    memory_total: int
    memory_available: int | None = None


class Cpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The CPU resources that this process may use. Affinity and cgroup quota limit ``cores``. Memory is in bytes."""

    cores: int
    memory_total: int  # of the machine
    memory_limit: int | None  # of the cgroup (v1 or v2), None without a limit
    memory_available: int  # the smaller of the machine's and the cgroup's available memory
    numa_nodes: tuple[NumaNode, ...] = ()
    amx: bool = False  # the CPU has Intel's matrix instructions (AMX); vLLM's bfloat16 attention then uses them


def read_cpu(root: Path = Path("/")) -> Cpu | None:
    """Return the CPU facts of the machine whose file system is at ``root``, or None without /proc (not Linux).

    A cgroup's limit applies to all cgroups below it. So our limit is the smallest one on the path from our cgroup to
    the root of the mount. A limit at or above the machine's memory counts as no limit. Page cache that the kernel
    frees under pressure (``inactive_file``) does not count as used. The kubelet and `docker stats` do the same.
    """
    if (host := host_memory(root)) is None:
        return None
    total, available = host
    allowed = _cpu_set(_field(root / "proc/self/status", "Cpus_allowed_list"))
    quota, limit = float("inf"), total
    for version, controller, folder in _cgroups(root):
        if controller == "cpu":
            quota = min(quota, _quota(version, folder))
        else:
            cgroup_limit, used = _memory(version, folder)
            limit, available = min(limit, cgroup_limit), min(available, max(0, cgroup_limit - used))
    return Cpu(
        cores=max(1, int(min(len(allowed) or 1, quota))),  # one thread also runs with a quota of half a core
        memory_total=total,
        memory_limit=limit if limit < total else None,
        memory_available=available,
        numa_nodes=_numa_nodes(root, allowed),
        amx="amx_tile" in _instruction_sets(root).split(),
    )


def host_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return (total, available) bytes of the whole machine, or None without /proc (not Linux).

    No cgroup limits them. They are the values of psutil.virtual_memory, which vLLM reads.
    """
    meminfo = _numbers(root / "proc/meminfo")
    if "MemTotal" not in meminfo:
        return None
    return meminfo["MemTotal"] * 1024, meminfo.get("MemAvailable", meminfo.get("MemFree", 0)) * 1024


_Controller = Literal["cpu", "memory"]
_NO_LIMIT = 1 << 62  # bytes; v1 writes PAGE_COUNTER_MAX (9223372036854771712), which is larger, for "no limit"


def read_instruction_sets(root: Path = Path("/")) -> str:
    """Return a name for this CPU's instruction sets, such as "cpu-5d2a01ff". CPUs that share it run the same code."""
    return f"cpu-{zlib.crc32(_instruction_sets(root).encode()):08x}"


def _instruction_sets(root: Path) -> str:
    """Return the list of the first core's instruction sets in /proc/cpuinfo, or "" if it has none."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)  # x86, ARM
    return match[1] if match else ""


def _cgroups(root: Path) -> Iterator[tuple[int, _Controller, Path]]:
    """Yield (cgroup version, controller, folder) of our cgroup and of its parents, as far as they are mounted.

    Both versions may be mounted at the same time (systemd's hybrid layout). The folders of v2 then have no files of the
    CPU and memory controllers, such as memory.max.
    """
    own_paths = {}  # our cgroup's path, by the name of the v1 controller, or by "" for v2
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        own_paths.update(dict.fromkeys(controllers.split(","), path))
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")  # proc(5), /proc/pid/mountinfo
        fields, source_fields = mount.split(), source.split()
        # Shorter lines do not follow proc(5).
        if len(fields) < 5 or len(source_fields) < 3 or source_fields[0] not in ("cgroup", "cgroup2"):  # noqa: PLR2004
            continue
        version, names = (2, [""]) if source_fields[0] == "cgroup2" else (1, source_fields[2].split(","))
        for name in names:
            if name not in own_paths or (version == 1 and name not in ("cpu", "memory")):
                continue
            for folder in _folders_upwards(root, mount_root=fields[3], mount_point=fields[4], path=own_paths[name]):
                for controller in ("cpu", "memory") if version == 2 else (name,):  # noqa: PLR2004  cgroup v2
                    yield version, "cpu" if controller == "cpu" else "memory", folder


def _folders_upwards(root: Path, *, mount_root: str, mount_point: str, path: str) -> Iterator[Path]:
    """Yield the folders from our cgroup (``path``) up to ``mount_point``.

    The mount shows the part of the hierarchy below ``mount_root``. Example: with ``mount_root`` "/docker/ab",
    ``mount_point`` "/sys/fs/cgroup" and ``path`` "/docker/ab/c", the folders are /sys/fs/cgroup/c and /sys/fs/cgroup.
    In a container, the mount may show only our own cgroup, while ``path`` is the path on the host. In a cgroup
    namespace, ``path`` may be "/", or lead above the mount ("/../.."). This function yields no folder outside the
    mount.
    """
    path_in_mount = PurePosixPath(path)
    if ".." in path_in_mount.parts:
        path_in_mount = PurePosixPath("/")
    elif path_in_mount.is_relative_to(mount_root):
        path_in_mount = PurePosixPath("/", path_in_mount.relative_to(mount_root))
    mount = root / mount_point.lstrip("/")
    folder = mount / str(path_in_mount).lstrip("/")
    while True:
        yield folder
        if folder == mount:
            return
        folder = folder.parent


def _quota(version: int, folder: Path) -> float:
    """Return the number of cores that the cgroup's quota allows, infinite without a quota."""
    if version == 1:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    else:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    try:
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    except (ValueError, ZeroDivisionError):  # the file is missing, or says "max"
        return float("inf")


def _memory(version: int, folder: Path) -> tuple[int, int]:
    """Return (limit, used) of one cgroup, bytes. ``used`` excludes memory that the kernel can free under pressure.

    The limit is _NO_LIMIT if there is none.
    """
    stat = _numbers(folder / "memory.stat")
    if version == 1:
        # hierarchical_memory_limit includes the limits of parents that are not mounted here.
        limits = [_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used, cache = _number(folder / "memory.usage_in_bytes"), stat.get("total_inactive_file", 0)
    else:
        limits = [_number(folder / "memory.max")]
        used, cache = _number(folder / "memory.current"), stat.get("inactive_file", 0)
    limit = min([limit for limit in limits if limit is not None], default=_NO_LIMIT)
    return min(limit, _NO_LIMIT), max(0, (used or 0) - cache)


_NODE_MEMORY = re.compile(r"(\S+):\s+(\d+) kB")
_AVAILABLE_FIELDS = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
"""The fields of a NUMA node's meminfo whose sum vLLM counts as available memory."""


def _numa_nodes(root: Path, allowed: frozenset[int]) -> tuple[NumaNode, ...]:
    nodes = []
    for folder in root.glob("sys/devices/system/node/node[0-9]*"):
        cores = len(_cpu_set(_text(folder / "cpulist")) & allowed)
        memory = {name: int(kilobytes) << 10 for name, kilobytes in _NODE_MEMORY.findall(_text(folder / "meminfo"))}
        if cores and "MemTotal" in memory:  # a node without cores is a GPU or CXL memory
            index = int(folder.name.removeprefix("node"))
            parts = [memory[name] for name in _AVAILABLE_FIELDS if name in memory]
            available = sum(parts) if len(parts) == len(_AVAILABLE_FIELDS) else None
            nodes.append(
                NumaNode(index=index, cores=cores, memory_total=memory["MemTotal"], memory_available=available)
            )
    return tuple(sorted(nodes, key=lambda node: node.index))


def _cpu_set(text: str) -> frozenset[int]:
    """Return the cores in a list of the kernel's format, such as "0-3,8"."""
    spans = [span.partition("-") for span in text.strip().split(",") if span.strip()]
    return frozenset(core for first, _, last in spans for core in range(int(first), int(last or first) + 1))


def _field(path: Path, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.*)$", _text(path), re.MULTILINE)
    return match[1] if match else ""


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers in a file of ``name value`` or ``name: value kB`` lines, by name."""
    return {name: int(value) for name, value in re.findall(r"^([^\s:]+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """Return the file's text without surrounding space, or "" if it cannot be read. All these files are optional."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
