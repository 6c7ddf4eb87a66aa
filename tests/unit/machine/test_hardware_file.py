from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.cpu import Cpu, NumaNode
from vllm_launch.machine.gpus import Gpu, GpuProcess, Hardware
from vllm_launch.machine.hardware_file import dump_hardware, load_hardware

DATA = Path(__file__).parents[2] / "data" / "hardware"
FULL = Hardware(
    gpus=(
        Gpu(
            index=0,
            uuid="MIG-1",
            name="NVIDIA H100 MIG 1g.10gb",
            memory_total=10 << 30,
            memory_free=9 << 30,
            compute_capability=(9, 0),
            mig_profile="1g.10gb",
            numa_node=1,
            pci_bus_id="00000000:01:00.0",
            processes=(GpuProcess(pid=1, name="x", memory=None),),
            faults=("replace it",),
        ),
        Gpu(index=1, uuid="GPU-2", name="B", memory_total=5 << 30, memory_free=0, compute_capability=(7, 5)),
    ),
    nvlink=((False, True), (True, False)),
    p2p=((False, False), (True, False)),
    driver="580.1",
    cuda=(13, 0),
    cpu=Cpu(
        cores=2,
        memory_total=9,
        memory_limit=8,
        memory_available=7,
        numa_nodes=(NumaNode(index=0, cores=2, memory_total=9),),
    ),
    warnings=("careful",),
)


def write(folder: Path, content: Any) -> Path:
    path = folder / "hardware.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def error_text(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_hardware(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "vllm-launch gpus --format json" in text
    return text


@pytest.mark.parametrize("hardware", [FULL, parse_hardware_name("H100:8"), Hardware(gpus=())])
def test_a_written_machine_is_read_back_with_its_path_as_source(tmp_path: Path, hardware: Hardware) -> None:
    path = write(tmp_path, dump_hardware(hardware))
    assert load_hardware(path) == msgspec.structs.replace(hardware, source=str(path))
    assert load_hardware(str(path)).source == str(path)
    assert path.read_bytes().endswith(b"}\n")
    assert b"\n  " in path.read_bytes()


def test_a_record_of_four_linked_gpus_is_read() -> None:
    path = DATA / "nvml-h200-x4.json"
    hardware = load_hardware(path)
    assert [gpu.index for gpu in hardware.gpus] == [0, 1, 2, 3]
    first = hardware.gpus[0]
    assert first.uuid == "GPU-4d2de922-b912-9b40-dc91-7cee04db3669"
    assert (first.name, first.compute_capability, first.pci_bus_id) == ("NVIDIA H200", (9, 0), "00000000:00:06.0")
    assert first.memory_total == first.memory_free == 150109880320  # NVML's total less its reserve
    others = tuple(tuple(a != b for b in range(4)) for a in range(4))
    assert hardware.nvlink == hardware.p2p == others
    assert (hardware.driver, hardware.cuda, hardware.source) == ("580.159.04", (13, 0), str(path))


def test_a_record_of_one_gpu_is_read() -> None:
    hardware = load_hardware(DATA / "nvml-h200-x1.json")
    assert len(hardware.gpus) == 1
    assert hardware.nvlink == hardware.p2p == ((False,),)


def record(**changes: Any) -> dict[str, Any]:
    layout = json.loads((DATA / "nvml-h200-x1.json").read_bytes())
    layout["gpus"][0] |= changes
    return layout


def test_fields_that_nvml_does_not_answer_are_unknown(tmp_path: Path) -> None:
    layout = record(mem_v2="ERR:Not Supported", mig="ERR:Not Supported", pci=None)
    layout |= {"driver": "ERR:Unknown Error", "cuda": "ERR:Unknown Error"}
    for name in ("p2p_read", "p2p_nvlink"):
        del layout["gpus"][0][name]
    hardware = load_hardware(write(tmp_path, layout))
    assert (hardware.driver, hardware.cuda, hardware.nvlink, hardware.p2p) == (None, None, (), ())
    assert hardware.gpus[0].memory_total == 150754820096  # from NVML's v1 call, which does not report the reserve


def test_pairs_without_the_status_ok_have_no_link(tmp_path: Path) -> None:
    layout = json.loads((DATA / "nvml-h200-x4.json").read_bytes())
    layout["gpus"][0]["p2p_read"][1] = "ERR:Not Supported"
    layout["gpus"][1]["p2p_nvlink"][0] = 1
    hardware = load_hardware(write(tmp_path, layout))
    assert hardware.p2p[0] == (False, False, True, True)
    assert hardware.nvlink[1] == (False, False, True, True)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"mig": [1, 1]}, "$.gpus[0].mig"),
        ({"mem_v2": "ERR:a", "mem": "ERR:Insufficient Permissions"}, "$.gpus[0].mem_v2"),
        ({"cc": "ERR:Not Supported"}, "$.gpus[0].cc"),
        ({"mem_v2": {"total": 1}}, "$.gpus[0].mem_v2"),
        ({"mem_v2": {"total": 10 << 30, "free": 20 << 30, "reserved": 0}}, "$.gpus[0].memory_free"),
        ({"p2p_read": [None, 0]}, "$.p2p"),
    ],
)
def test_the_error_for_a_wrong_record_has_the_json_path(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    assert f"hardware.json: {where}" in error_text(write(tmp_path, record(**changes)))


def changed(*path: Any, to: Any) -> dict[str, Any]:
    layout = json.loads(dump_hardware(FULL))
    parent = layout
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = to
    return layout


def without(*path: Any) -> dict[str, Any]:
    layout = json.loads(dump_hardware(FULL))
    parent = layout
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    return layout


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"{", "not JSON"),
        (dump_hardware(FULL)[:200], "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"driver": "\xff"}', "not UTF-8"),
        (b"[" * 1_000_000, "not JSON"),
        (b"GPU 0: NVIDIA H200", "not JSON"),
        (b"[]", "$: expected `object`, got `array`"),
        (b"null", "expected `object`, got `null`"),
        (b"{}", "gpus"),
        (b" " * (16 << 20) + b"{}", "is larger than 16 MiB"),
        (changed("gpus", to=3), "$.gpus: expected `array`"),
        (changed("gpu", to=3), "unknown field `gpu`"),
        (changed("gpus", 1, "memory", to=3), "$.gpus[1]: "),
        (without("gpus", 1, "uuid"), "$.gpus[1]: "),
        (changed("gpus", 0, "memory_total", to="10 GiB"), "$.gpus[0].memory_total: expected `int`, got `str`"),
        (changed("gpus", 0, "memory_total", to=1.5e10), "$.gpus[0].memory_total: expected `int`"),
        (changed("gpus", 0, "memory_total", to=True), "$.gpus[0].memory_total: expected `int`"),
        (changed("gpus", 0, "memory_total", to=0), "$.gpus[0].memory_total: 0 bytes"),
        (changed("gpus", 0, "memory_total", to=-1), "$.gpus[0].memory_total: -1 bytes"),
        (changed("gpus", 0, "memory_total", to=(1 << 44) + 1), "$.gpus[0].memory_total"),
        (changed("gpus", 0, "memory_total", to=10**30), "$.gpus[0].memory_total"),
        (changed("gpus", 0, "memory_free", to=-1), "$.gpus[0].memory_free: -1 is not between"),
        (
            changed("gpus", 1, "memory_free", to=6 << 30),
            "$.gpus[1].memory_free: 6442450944 is not between 0 and memory_total",
        ),
        (changed("gpus", 1, "uuid", to="MIG-1"), "$.gpus[1].uuid: 'MIG-1' is used twice"),
        (changed("gpus", 1, "uuid", to=""), "$.gpus[1].uuid: '' is empty"),
        (changed("gpus", 1, "index", to=-1), "$.gpus[1]: index and compute_capability"),
        (changed("gpus", 1, "compute_capability", to=[-1, 0]), "$.gpus[1]: index and compute_capability"),
        (changed("gpus", 1, "compute_capability", to=[9]), "$.gpus[1].compute_capability"),
        (changed("gpus", 1, "compute_capability", to="9.0"), "$.gpus[1].compute_capability"),
        (changed("nvlink", to=[[False]]), "$.nvlink: must have 2 rows and columns"),
        (changed("nvlink", 0, to=[False]), "$.nvlink: must have 2 rows and columns"),
        (changed("p2p", to=[[False] * 3] * 3), "$.p2p: must have 2 rows and columns"),
        (changed("p2p", 0, 0, to=1), "$.p2p[0][0]: expected `bool`"),
        (changed("cpu", "cores", to=0), "$.cpu: cores and memory_total"),
        (changed("cpu", "memory_total", to=0), "$.cpu: cores and memory_total"),
        (changed("cpu", "sockets", to=2), "$.cpu: "),
        (changed("cuda", to="13.0"), "$.cuda"),
    ],
)
def test_the_error_for_a_wrong_file_has_the_json_path_and_the_remedy(
    tmp_path: Path, content: Any, expected: str
) -> None:
    text = error_text(write(tmp_path, content))
    assert text.startswith(str(tmp_path / "hardware.json"))
    assert expected in text


def test_a_path_that_is_not_a_readable_file_is_an_error(tmp_path: Path) -> None:
    assert "is a directory" in error_text(tmp_path)
    assert "No such file" in error_text(tmp_path / "absent.json")
    assert "cannot be read" in error_text(Path("a\0b"))
    assert "cannot be read" in error_text(tmp_path / ("n" * 300))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be read" in error_text(loop)
    assert "Not a directory" in error_text(write(tmp_path, b"") / "below")


def test_a_file_that_cannot_be_read_is_an_error() -> None:
    # Address 0 of a process's memory cannot be read by root either. File modes would not stop root.
    assert "cannot be read" in error_text(Path("/proc/self/mem"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
PATHS = [
    *[(name,) for name in ("gpus", "nvlink", "p2p", "driver", "cuda", "cpu", "warnings")],
    *[("gpus", 0, field) for field in Gpu.__struct_fields__],
    ("gpus", 0),
    ("p2p", 0),
    ("cpu", "numa_nodes"),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.tuples(st.sampled_from(PATHS), JSON).map(lambda change: changed(*change[0], to=change[1])))
def test_any_file_gives_a_machine_or_a_one_line_error(tmp_path: Path, content: Any) -> None:
    try:
        assert isinstance(load_hardware(write(tmp_path, content)), Hardware)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either outcome is right


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["mem", "mem_v2", "mig", "cc", "name", "uuid", "pci", "p2p_read", "p2p_nvlink"]),
    JSON | st.tuples(st.integers(), st.integers()),
)
def test_any_record_gives_a_machine_or_a_one_line_error(tmp_path: Path, field: str, value: Any) -> None:
    try:
        assert isinstance(load_hardware(write(tmp_path, record(**{field: value}))), Hardware)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either outcome is right
