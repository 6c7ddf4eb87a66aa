"""Tests of vllm_launch.machine.cpu on file trees with the layouts of kernels, systemd, Docker and Kubernetes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.machine.cpu import Cpu, NumaNode, _cpu_set, read_cpu, read_instruction_sets

GIB = 1 << 30
MEMINFO = "MemTotal:       67108864 kB\nMemFree:        10485760 kB\nMemAvailable:   52428800 kB\n"
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "36 31 0:33 {root} /sys/fs/cgroup/memory rw,relatime shared:15 - cgroup cgroup rw,memory\n"
    "37 31 0:34 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:16 - cgroup cgroup rw,cpu,cpuacct\n"
    "38 31 0:35 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
)
NO_LIMIT_V1 = "9223372036854771712\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write ``files``, and the files of a machine with eight cores and 64 GiB, below ``root``. Return ``root``."""
    machine = {
        "proc/meminfo": MEMINFO,
        "proc/self/status": "Name:\tpython3\nCpus_allowed:\tff\nCpus_allowed_list:\t0-7\n",
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "23 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n",
    }
    for name, text in (machine | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def read(root: Path, files: dict[str, str]) -> Cpu:
    cpu = read_cpu(tree(root, files))
    assert cpu is not None
    return cpu


def v2(path: str, files: dict[str, str], mounted: str = "/") -> dict[str, str]:
    inside = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2_MOUNT.format(root=mounted),
        **inside,
    }


def v1(path: str, files: dict[str, str], mounted: str = "/") -> dict[str, str]:
    inside = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return {
        "proc/self/cgroup": f"5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/user.slice\n",
        "proc/self/mountinfo": V1_MOUNTS.format(root=mounted),
        **inside,
    }


def test_without_cgroups_all_cores_and_memory_are_available(tmp_path):
    assert read(tmp_path, {}) == Cpu(
        cores=8, memory_total=64 * GIB, memory_limit=None, memory_available=50 * GIB, numa_nodes=()
    )


def test_cores_are_those_of_the_affinity_mask(tmp_path):
    assert read(tmp_path, {"proc/self/status": "Cpus_allowed_list:\t0-1,4\n"}).cores == 3


def test_limits_of_a_v2_container_whose_cgroup_is_the_root(tmp_path):
    cpu = read(
        tmp_path,
        v2(
            "/",
            {
                "memory.max": f"{8 * GIB}\n",
                "memory.current": f"{3 * GIB}\n",
                "memory.stat": f"anon 5\ninactive_file {GIB}\n",
                "cpu.max": "250000 100000\n",
            },
        ),
    )
    assert (cpu.cores, cpu.memory_limit, cpu.memory_available) == (2, 8 * GIB, 6 * GIB)


def test_the_smallest_v2_limit_on_the_path_applies(tmp_path):
    files = {
        "kubepods.slice/memory.max": f"{4 * GIB}\n",
        "kubepods.slice/cpu.max": "300000 100000\n",
        "kubepods.slice/pod1/memory.max": f"{6 * GIB}\n",
        "kubepods.slice/pod1/cpu.max": "max 100000\n",
        "kubepods.slice/pod1/c1/memory.max": "max\n",
    }
    cpu = read(tmp_path, v2("/kubepods.slice/pod1/c1", files))
    assert (cpu.cores, cpu.memory_limit) == (3, 4 * GIB)


def test_limits_of_sibling_and_child_cgroups_do_not_apply(tmp_path):
    files = {"a/memory.max": f"{GIB}\n", "b/c/memory.max": f"{GIB}\n", "b/memory.max": "max\n"}
    assert read(tmp_path, v2("/b", files)).memory_limit is None


def test_a_v2_cgroup_without_limits_has_no_limit(tmp_path):
    cpu = read(tmp_path, v2("/user.slice", {"user.slice/memory.max": "max\n", "user.slice/cpu.max": "max 100000\n"}))
    assert (cpu.cores, cpu.memory_limit, cpu.memory_available) == (8, None, 50 * GIB)


def test_memory_that_the_parent_cgroup_uses_is_not_available(tmp_path):
    files = {
        "pod/memory.max": f"{10 * GIB}\n",
        "pod/memory.current": f"{9 * GIB}\n",  # mostly of another container
        "pod/own/memory.max": f"{8 * GIB}\n",
        "pod/own/memory.current": "0\n",
    }
    cpu = read(tmp_path, v2("/pod/own", files))
    assert (cpu.memory_limit, cpu.memory_available) == (8 * GIB, GIB)


def test_limits_of_a_v1_docker_container_whose_path_in_proc_is_the_hosts(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB // 2}\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
        "cpu,cpuacct/cpu.cfs_period_us": "50000\n",
    }
    cpu = read(tmp_path, v1("/docker/abc", files, mounted="/docker/abc"))
    assert (cpu.cores, cpu.memory_limit, cpu.memory_available) == (3, 2 * GIB, 2 * GIB - GIB // 2)


def test_v1_limits_of_parent_cgroups_apply_on_the_host(tmp_path):
    files = {
        "memory/slurm/memory.limit_in_bytes": f"{5 * GIB}\n",
        "memory/slurm/job/memory.limit_in_bytes": NO_LIMIT_V1,
        "cpu,cpuacct/slurm/job/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/slurm/job/cpu.cfs_period_us": "100000\n",
    }
    cpu = read(tmp_path, v1("/slurm/job", files))
    assert (cpu.cores, cpu.memory_limit) == (8, 5 * GIB)


def test_a_mount_may_show_only_a_part_of_the_hierarchy(tmp_path):
    files = {"memory/pod/memory.limit_in_bytes": f"{6 * GIB}\n"}
    assert read(tmp_path, v1("/kubepods/pod", files, mounted="/kubepods")).memory_limit == 6 * GIB


def test_a_huge_v1_limit_means_no_limit(tmp_path):
    assert read(tmp_path, v1("/", {"memory/memory.limit_in_bytes": NO_LIMIT_V1})).memory_limit is None


def test_a_v1_limit_inherited_from_outside_the_mount_applies(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "memory/memory.stat": f"hierarchical_memory_limit {3 * GIB}\n",
    }
    assert read(tmp_path, v1("/kubepods/pod/c", files, mounted="/kubepods/pod/c")).memory_limit == 3 * GIB


def test_in_a_hybrid_layout_v1_has_the_limits(tmp_path):
    hybrid = v1("/app", {"memory/app/memory.limit_in_bytes": f"{7 * GIB}\n"})
    hybrid["proc/self/cgroup"] += "0::/app\n"
    hybrid["proc/self/mountinfo"] += "39 31 0:36 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    assert read(tmp_path, hybrid).memory_limit == 7 * GIB


def test_a_path_above_the_namespaces_root_is_read_at_the_mount(tmp_path):
    files = v2("/../../other", {"memory.max": f"{4 * GIB}\n"})
    tree(tmp_path, {"sys/other/memory.max": "1\n", "sys/fs/other/memory.max": "1\n"})
    assert read(tmp_path, files).memory_limit == 4 * GIB


def test_a_limit_above_the_machines_memory_is_no_limit(tmp_path):
    assert read(tmp_path, v2("/", {"memory.max": f"{65 * GIB}\n"})).memory_limit is None


def test_a_quota_below_one_core_gives_one_core(tmp_path):
    assert read(tmp_path, v2("/", {"cpu.max": "50000 100000\n"})).cores == 1


@pytest.mark.parametrize("text", ["", "100000 0\n", "garbage", "max", "0 100000"])
def test_an_invalid_quota_is_no_quota(tmp_path, text):
    assert read(tmp_path, v2("/", {"cpu.max": text})).cores == 8


def test_a_cgroup_over_its_limit_has_no_available_memory(tmp_path):
    files = v2("/", {"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"})
    assert read(tmp_path, files).memory_available == 0


def test_numa_nodes_count_only_allowed_cores_and_nodes_without_any_are_left_out(tmp_path):
    nodes = {
        f"sys/devices/system/node/node{index}/{name}": text
        for index, cores in enumerate(["0-3", "4-7", "", "8-11"])
        for name, text in (("cpulist", f"{cores}\n"), ("meminfo", f"Node {index} MemTotal:  33554432 kB\n"))
    }
    numa_nodes = read(tmp_path, {**nodes, "proc/self/status": "Cpus_allowed_list:\t2-7\n"}).numa_nodes
    assert numa_nodes == (
        NumaNode(index=0, cores=2, memory_total=32 * GIB),
        NumaNode(index=1, cores=4, memory_total=32 * GIB),
    )


def test_numa_nodes_are_sorted_by_index(tmp_path):
    nodes = {}
    for index in (10, 2):
        nodes[f"sys/devices/system/node/node{index}/cpulist"] = f"{index % 8}\n"
        nodes[f"sys/devices/system/node/node{index}/meminfo"] = f"Node {index} MemTotal: 1024 kB\n"
    assert [node.index for node in read(tmp_path, nodes).numa_nodes] == [2, 10]


def test_free_memory_replaces_a_missing_memavailable(tmp_path):
    assert read(tmp_path, {"proc/meminfo": "MemTotal: 2048 kB\nMemFree: 1024 kB\n"}).memory_available == 1 << 20


def test_without_proc_there_are_no_cpu_facts(tmp_path):
    assert read_cpu(tmp_path) is None


def test_garbage_in_proc_raises_no_error(tmp_path):
    files = {"proc/self/cgroup": "\nnonsense\n::\n", "proc/self/mountinfo": "- \n1 2 3 - cgroup2\n - cgroup a b\n"}
    assert read(tmp_path, {**files, "proc/self/status": ""}).cores == 1


@given(st.sets(st.integers(0, 2000)))
def test_any_list_of_cores_in_the_kernels_format_is_read(cores):
    spans, ordered = [], sorted(cores)
    for core in ordered:
        if spans and spans[-1][1] == core - 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    text = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
    assert _cpu_set(text + "\n") == cores


@given(st.text(alphabet="0123456789:/.,-\n cgroup2memaxSECRT\x00é", max_size=200))
def test_no_text_in_proc_or_a_cgroup_raises_an_error(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("root")
    files = {"proc/self/cgroup": text, "proc/self/mountinfo": text, "sys/fs/cgroup/memory.max": text}
    assert read_cpu(tree(root, files)) is not None
    assert read_cpu(tree(root, {**v2("/", {"cpu.max": text, "memory.max": text, "memory.stat": text})})) is not None


def test_available_memory_of_a_numa_node_is_computed_as_in_vllm(tmp_path):
    meminfo = """Node 0 MemTotal:       10446624 kB
Node 0 MemFree:         1000 kB
Node 0 Active(file):     200 kB
Node 0 Inactive(file):    30 kB
Node 0 SReclaimable:       4 kB
"""
    nodes = {"sys/devices/system/node/node0/cpulist": "0-3", "sys/devices/system/node/node0/meminfo": meminfo}
    [node] = read(tmp_path, {**nodes, "proc/self/status": "Cpus_allowed_list:\t0-3\n"}).numa_nodes
    assert (node.memory_total, node.memory_available) == (10446624 << 10, 1234 << 10)


def test_cpus_with_the_same_instruction_sets_have_the_same_name(tmp_path):
    def name(text):
        return read_instruction_sets(tree(tmp_path / str(abs(hash(text))), {"proc/cpuinfo": text}))

    avx2 = name("model name\t: AMD EPYC\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n")
    assert avx2 == name("model name\t: Intel\nflags\t\t: fpu avx2\n")
    assert avx2.startswith("cpu-")
    arm = name("Features\t: fp asimd\n")
    assert len({avx2, arm, name("flags\t\t: fpu avx2 avx512f\n"), read_instruction_sets(tmp_path)}) == 4


def test_amx_is_read_from_the_kernels_list(tmp_path):
    sapphire = read(tmp_path / "intel", {"proc/cpuinfo": "flags\t\t: fpu avx512f amx_bf16 amx_tile amx_int8\n"})
    genoa = read(tmp_path / "amd", {"proc/cpuinfo": "flags\t\t: fpu avx512f avx512_bf16\n"})
    assert (sapphire.amx, genoa.amx) == (True, False)
