from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_health import gpu_facts
from vllm_launch.engine.requirements import driver_too_old
from vllm_launch.errors import UsageError
from vllm_launch.machine import gpus
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Gpu, Hardware, alike, faults, from_snapshot, gpu_too_old, visible
from vllm_launch.machine.hardware_file import dump_hardware, load_hardware

DATA = Path(__file__).parents[2] / "data" / "hardware"
GIB = 1 << 30
ALL = gpu_facts.P2P(read=True, write=True, nvlink=True)


def device(index: int, **changes: Any) -> gpu_facts.Device:
    facts: dict[str, Any] = {
        "index": index,
        "uuid": f"GPU-{index}0000000-aaaa",
        "name": "NVIDIA L4",
        "pci_bus_id": f"00000000:0{index}:00.0",
        "memory": gpu_facts.Memory(total=24 * GIB, reserved=GIB, free=20 * GIB, used=3 * GIB),
        "compute_capability": (8, 9),
        "mig_enabled": False,
        "mig_slices": (),
        "processes": (),
        "ecc": gpu_facts.Ecc(volatile=0),
        "remapped_rows": None,
        "nvlinks": (),
    }
    return gpu_facts.Device(**{**facts, **changes})


def part(uuid: str, profile: str, memory: int | None = GIB) -> gpu_facts.MigSlice:
    facts = None if memory is None else gpu_facts.Memory(total=memory, reserved=0, free=memory, used=0)
    return gpu_facts.MigSlice(
        uuid=uuid, name=f"NVIDIA H100 MIG {profile}", profile=profile, memory=facts, processes=None
    )


def snapshot(*devices: gpu_facts.Device, pair: gpu_facts.P2P | None = ALL, **changes: Any) -> gpu_facts.Snapshot:
    facts: dict[str, Any] = {
        "driver": "580.1",
        "cuda": (13, 0),
        "devices": devices,
        "p2p": tuple(tuple(None if a is b else pair for b in devices) for a in devices),
        "lost": (),
    }
    return gpu_facts.Snapshot(**{**facts, **changes})


def test_the_memory_of_a_recorded_machine_is_the_total_of_cuda() -> None:
    recorded = msgspec.json.decode((DATA / "snapshot-h100.json").read_bytes(), type=gpu_facts.Snapshot)
    hardware = from_snapshot(recorded)
    assert hardware.gpus[0].memory_total == 85017493504  # torch.cuda.mem_get_info()[1], recorded in the same minute
    assert hardware.gpus[0].memory_total == parse_hardware_name("H100").gpus[0].memory_total
    assert (hardware.driver, hardware.cuda, hardware.p2p, hardware.warnings) == (
        "580.159.04",
        (13, 0),
        ((False,),),
        (),
    )


def test_total_memory_excludes_the_reserve_and_free_memory_is_nvmls_simulated() -> None:
    gpu = from_snapshot(snapshot(device(0))).gpus[0]
    assert (gpu.memory_total, gpu.memory_free) == (23 * GIB, 20 * GIB)
    old = gpu_facts.Memory(total=24 * GIB, reserved=None, free=20 * GIB, used=4 * GIB)
    assert from_snapshot(snapshot(device(0, memory=old))).gpus[0].memory_total == 24 * GIB


def test_other_processes_on_the_gpu_are_listed_simulated() -> None:
    others = (
        gpu_facts.Process(pid=9, name="/usr/bin/python3", memory=3 * GIB),
        gpu_facts.Process(pid=10, name=None, memory=None),
    )
    processes = from_snapshot(snapshot(device(0, processes=others))).gpus[0].processes
    assert processes == (
        gpus.GpuProcess(pid=9, name="/usr/bin/python3", memory=3 * GIB),
        gpus.GpuProcess(pid=10, name="unknown", memory=None),
    )
    assert from_snapshot(snapshot(device(0, processes=None))).gpus[0].processes == ()


@pytest.mark.parametrize(
    ("pair", "nvlink", "p2p"),
    [
        (ALL, True, True),
        (gpu_facts.P2P(read=True, write=True, nvlink=False), False, True),
        (gpu_facts.P2P(read=True, write=False, nvlink=True), True, False),
        (gpu_facts.P2P(read=False, write=True, nvlink=None), False, False),
        (gpu_facts.P2P(read=None, write=None, nvlink=None), False, False),
        (None, False, False),
    ],
)
def test_a_pair_has_p2p_only_if_nvml_reports_read_and_write_simulated(
    pair: gpu_facts.P2P | None, *, nvlink: bool, p2p: bool
) -> None:
    hardware = from_snapshot(snapshot(device(0), device(1), pair=pair))
    assert hardware.nvlink == ((False, nvlink), (nvlink, False))
    assert hardware.p2p == ((False, p2p), (p2p, False))


def test_mig_slices_replace_their_gpu_simulated() -> None:
    split = device(0, memory=None, mig_enabled=True, mig_slices=(part("MIG-a", "1g.10gb"), part("MIG-b", "3g.40gb")))
    hardware = from_snapshot(snapshot(split, device(1)))
    assert [(gpu.index, gpu.uuid, gpu.mig_profile) for gpu in hardware.gpus] == [
        (0, "MIG-a", "1g.10gb"),
        (0, "MIG-b", "3g.40gb"),
        (1, "GPU-10000000-aaaa", None),
    ]
    assert hardware.gpus[0].compute_capability == (8, 9)
    assert hardware.p2p[0] == (False, False, True)
    assert any("only one MIG slice" in text for text in hardware.warnings)


def test_unusable_gpus_are_left_out_with_a_warning_simulated() -> None:
    no_slices = device(0, memory=None, mig_enabled=True, mig_slices=(part("MIG-a", "1g.10gb", None),))
    no_memory = device(1, memory=None, name="NVIDIA Unheard-of 9000")
    no_uuid = device(2, memory=None, mig_enabled=True, mig_slices=(part("", "1g.10gb"),))
    hardware = from_snapshot(snapshot(no_slices, no_memory, no_uuid, device(3), lost=((4, "GPU is lost"),)))
    assert [gpu.index for gpu in hardware.gpus] == [3]
    assert hardware.p2p == ((False,),)
    assert [text for text in hardware.warnings if "GPU 0 " in text and "nvidia-smi mig" in text]
    assert [text for text in hardware.warnings if "GPU 1 " in text and "run nvidia-smi and fix" in text]
    assert [text for text in hardware.warnings if "GPU 2 " in text and "nvidia-smi mig" in text]
    assert "GPU 4 is left out: GPU is lost" in hardware.warnings
    assert not [text for text in hardware.warnings if "--hardware" in text]  # `serve` does not have this flag


def test_a_known_gpu_whose_memory_nvml_does_not_tell_has_the_memory_of_its_model_simulated() -> None:
    other = gpu_facts.Process(pid=9, name="python3", memory=3 * GIB)
    hardware = from_snapshot(snapshot(device(0, memory=None, processes=(other,))))
    [gpu] = hardware.gpus
    total = parse_hardware_name("L4").gpus[0].memory_total
    assert (gpu.memory_total, gpu.memory_free, gpu.unified) == (total, total - 3 * GIB, False)
    assert "NVML does not report the memory of GPU 0 (NVIDIA L4): the plan assumes 22.03 GiB" in hardware.warnings[0]


GB10_KIB = 127_601_836  # 121.69 GiB
AVAILABLE_KIB = 122_085_700  # 116.43 GiB


def host(tmp_path: Path, *, total: int = GB10_KIB, available: int = AVAILABLE_KIB) -> Path:
    (tmp_path / "proc").mkdir()
    meminfo = f"MemTotal: {total} kB\nMemFree: 2904000 kB\nMemAvailable: {available} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "capability"), [("NVIDIA GB10", (12, 1)), ("NVIDIA Thor", (11, 0)), ("Orin (nvgpu)", (8, 7))]
)
def test_a_gpu_inside_a_processor_has_the_hosts_memory_if_nvml_does_not_support_the_question_simulated(
    tmp_path: Path, name: str, capability: tuple[int, int]
) -> None:
    hardware = from_snapshot(snapshot(device(0, memory=None, name=name, compute_capability=capability)), host(tmp_path))
    [gpu] = hardware.gpus
    assert gpu.unified
    assert (gpu.memory_total, gpu.memory_free) == (GB10_KIB * 1024, AVAILABLE_KIB * 1024)
    assert f"GPU 0 ({name}) shares its memory with the host" in hardware.warnings[0]
    assert not [text for text in hardware.warnings if "left out" in text or "--hardware" in text]


def test_free_memory_of_such_a_gpu_is_the_hosts_even_if_nvml_reports_some_simulated(tmp_path: Path) -> None:
    nvmls = gpu_facts.Memory(
        total=120 * GIB, reserved=GIB, free=2 * GIB, used=117 * GIB
    )  # the page cache counts as used
    found = device(0, memory=nvmls, name="NVIDIA GB10", compute_capability=(12, 1))
    [gpu] = from_snapshot(snapshot(found), host(tmp_path)).gpus
    assert (gpu.memory_total, gpu.memory_free) == (119 * GIB, AVAILABLE_KIB * 1024)
    (tmp_path / "idle").mkdir()
    idle = host(tmp_path / "idle", available=GB10_KIB)
    assert from_snapshot(snapshot(found), idle).gpus[0].memory_free == 119 * GIB


def test_the_hosts_memory_does_not_depend_on_a_limit_of_the_cgroup_simulated(tmp_path: Path) -> None:
    host(tmp_path)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{GIB}\n")
    found = device(0, memory=None, compute_capability=(12, 1))
    assert from_snapshot(snapshot(found), tmp_path).gpus[0].memory_free == AVAILABLE_KIB * 1024


def test_a_gpu_of_unknown_capability_and_memory_counts_as_part_of_a_processor_simulated(tmp_path: Path) -> None:
    unknown = device(0, memory=None, compute_capability=None, name="unknown GPU")
    hardware = from_snapshot(snapshot(unknown), host(tmp_path))
    assert (hardware.gpus[0].unified, hardware.gpus[0].compute_capability) == (True, (0, 0))
    assert any("does not report the compute capability of GPU 0" in text for text in hardware.warnings)


def test_a_known_gpu_whose_capability_nvml_does_not_tell_has_that_of_its_model_simulated(tmp_path: Path) -> None:
    hardware = from_snapshot(snapshot(device(0, compute_capability=None, memory=None)), host(tmp_path))
    assert (hardware.gpus[0].unified, hardware.gpus[0].compute_capability) == (False, (8, 9))
    assert any("vLLM also reads from NVML: vLLM may fail to start" in text for text in hardware.warnings)


def test_gpus_without_uuids_can_be_told_apart_and_written_to_a_file_simulated(tmp_path: Path) -> None:
    hardware = from_snapshot(snapshot(device(0, uuid=""), device(1, uuid="")))
    assert len({gpu.uuid for gpu in hardware.gpus}) == 2
    (tmp_path / "hardware.json").write_bytes(dump_hardware(hardware))
    assert load_hardware(tmp_path / "hardware.json").gpus == hardware.gpus
    assert [gpu.index for gpu in visible(hardware, "1").gpus] == [1]


def test_the_numa_node_comes_from_sys_simulated(tmp_path: Path) -> None:
    for bus, node in [("0000:00:00.0", "1\n"), ("0000:01:00.0", "-1\n"), ("0000:02:00.0", "?")]:
        (tmp_path / "sys/bus/pci/devices" / bus).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / bus / "numa_node").write_text(node)
    five_gpus = snapshot(*(device(index) for index in range(4)), device(4, pci_bus_id=None))
    assert [gpu.numa_node for gpu in from_snapshot(five_gpus, tmp_path).gpus] == [1, None, None, None, None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"ecc": gpu_facts.Ecc(volatile=None)}, []),
        ({"ecc": gpu_facts.Ecc(volatile=3)}, ["uncorrectable ECC errors since the driver was loaded: 3"]),
        ({"remapped_rows": (1, 1, False, False)}, []),
        ({"remapped_rows": (0, 1, True, False)}, ["reset the GPU"]),
        ({"remapped_rows": (0, 1, False, True)}, ["replace the GPU"]),
        (
            {"remapped_rows": (0, 1, True, True), "ecc": gpu_facts.Ecc(volatile=1)},
            ["replace", "reset", "was loaded: 1"],
        ),
    ],
)
def test_a_fault_is_a_sentence_with_a_remedy_simulated(changes: dict[str, Any], words: list[str]) -> None:
    if rows := changes.pop("remapped_rows", None):
        names = ("correctable", "uncorrectable", "pending", "failure")
        changes = {**changes, "remapped_rows": gpu_facts.RemappedRows(**dict(zip(names, rows, strict=True)))}
    sentences = faults(device(0, **changes))
    assert len(sentences) == len(words)
    assert all(word in text for word, text in zip(words, sentences, strict=True))
    assert from_snapshot(snapshot(device(0, **changes))).gpus[0].faults == sentences


class BindingWithoutDriver:
    NVMLError = pynvml.NVMLError

    def nvmlInit(self) -> None:  # noqa: N802  the binding's name
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


class BindingWithoutGpus:
    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError

    def __getattr__(self, name: str) -> Any:
        return lambda *_: {"nvmlDeviceGetCount": 0, "nvmlSystemGetDriverVersion": "580.1"}.get(name)


@pytest.mark.parametrize(
    ("environ", "file", "sign"),
    [
        ({}, None, None),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, None, None),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, None, None),
        ({"NVIDIA_VISIBLE_DEVICES": ""}, None, None),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None, "NVIDIA_VISIBLE_DEVICES is all"),
        ({}, "nvidia0", "/dev/nvidia0 exists"),
        ({}, "nvidiactl", None),
    ],
)
@pytest.mark.parametrize(
    ("binding", "why"),
    [(BindingWithoutDriver(), "install the NVIDIA driver"), (BindingWithoutGpus(), "NVML finds no GPU")],
)
def test_without_gpus_there_is_a_warning_only_if_something_shows_gpus_simulated(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    binding: Any,
    why: str,
    environ: dict[str, str],
    file: str | None,
    sign: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    (tmp_path / "dev").mkdir()
    if file:
        (tmp_path / "dev" / file).touch()
    hardware = gpus.read_hardware(environ, tmp_path)
    assert (hardware.gpus, hardware.cpu) == ((), None)
    if sign is None:
        assert hardware.warnings == ()
    else:
        assert len(hardware.warnings) == 1
        assert sign in hardware.warnings[0]
        assert why in hardware.warnings[0]


def test_a_jetson_without_nvml_gives_a_warning_simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", BindingWithoutDriver())
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    [warning] = gpus.read_hardware({}, tmp_path).warnings
    assert "/etc/nv_tegra_release exists, as on a Jetson" in warning


def test_a_machine_with_gpus_also_has_cpu_facts_simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    binding = BindingWithoutGpus()
    memory = SimpleNamespace(total=2 * GIB, reserved=GIB, free=GIB, used=0)
    answers = {"DeviceGetCount": 1, "DeviceGetMemoryInfo": memory, "DeviceGetName": "NVIDIA L4"}
    answers["DeviceGetCudaComputeCapability"] = (8, 9)
    for name, answer in answers.items():
        setattr(binding, f"nvml{name}", lambda *_, answer=answer: answer)
    binding.nvmlDeviceGetHandleByIndex = lambda index: f"handle {index}"
    binding.NVML_NVLINK_MAX_LINKS = 0
    binding.nvmlDeviceGetMaxMigDeviceCount = lambda _: 0
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    hardware = gpus.read_hardware({"NVIDIA_VISIBLE_DEVICES": "all"}, tmp_path)
    assert [(gpu.name, gpu.memory_total) for gpu in hardware.gpus] == [("NVIDIA L4", GIB)]
    assert hardware.cpu is not None
    assert hardware.cpu.memory_total == 1 << 20
    assert hardware.warnings == ()


def machine(*uuids: str) -> Hardware:
    chosen = tuple(
        Gpu(
            index=place,
            uuid=uuid,
            name="NVIDIA L4",
            memory_total=GIB,
            memory_free=GIB,
            compute_capability=(8, 9),
        )
        for place, uuid in enumerate(uuids)
    )
    # The matrices differ from row to row, so that a wrong selection of rows or columns shows.
    nvlink = tuple(tuple(a != b and (a + b) % 2 == 1 for b in range(len(uuids))) for a in range(len(uuids)))
    p2p = tuple(tuple(a < b for b in range(len(uuids))) for a in range(len(uuids)))
    return Hardware(gpus=chosen, nvlink=nvlink, p2p=p2p, driver="580.1")


FOUR = machine("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333", "GPU-cccc4444")
SLICED = msgspec.structs.replace(
    machine("MIG-aaaa", "MIG-bbbb", "GPU-cccc"),
    gpus=tuple(
        msgspec.structs.replace(gpu, index=index, mig_profile=profile)
        for gpu, index, profile in zip(
            machine("MIG-aaaa", "MIG-bbbb", "GPU-cccc").gpus, (0, 0, 1), ("1g.10gb", "1g.10gb", None), strict=True
        )
    ),
)


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        (" ", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", [0]),
        ("3,1", [3, 1]),
        (" 2 , 0 ", [2, 0]),
        ("GPU-bbbb3333", [2]),
        ("GPU-b", [2]),
        ("gpu-B", [2]),
        ("GPU-aaaa2,0", [1, 0]),
        ("02", [2]),
    ],
)
def test_cuda_visible_devices_keeps_the_named_gpus_in_its_order(value: str | None, places: list[int]) -> None:
    hardware = visible(FOUR, value)
    assert hardware.gpus == tuple(FOUR.gpus[place] for place in places)
    assert hardware.nvlink == tuple(tuple(FOUR.nvlink[a][b] for b in places) for a in places)
    assert hardware.p2p == tuple(tuple(FOUR.p2p[a][b] for b in places) for a in places)
    assert hardware.driver == "580.1"


def test_unknown_links_stay_unknown() -> None:
    no_links = msgspec.structs.replace(FOUR, nvlink=(), p2p=())
    assert visible(no_links, "1").nvlink == visible(no_links, "1").p2p == ()


def test_a_mig_slice_is_selected_by_its_uuid() -> None:
    assert [gpu.uuid for gpu in visible(SLICED, "MIG-bbbb").gpus] == ["MIG-bbbb"]
    assert [gpu.uuid for gpu in visible(SLICED, "1").gpus] == ["GPU-cccc"]


@pytest.mark.parametrize(
    ("hardware", "value", "problem"),
    [
        (FOUR, "4", "'4' names no GPU of this machine"),
        (FOUR, "0,9", "'9' names no GPU of this machine"),
        (FOUR, "-2", "'-2' names no GPU of this machine"),
        (FOUR, "0,-1", "'-1' names no GPU of this machine"),
        (FOUR, "0,", "'' names no GPU of this machine"),
        (FOUR, "all", "'all' names no GPU of this machine"),
        (FOUR, "G", "'G' names no GPU of this machine"),
        (FOUR, "GPU-", "matches several UUIDs"),
        (FOUR, "GPU-aaaa", "'GPU-aaaa' matches several UUIDs"),
        (FOUR, "GPU-ffff", "'GPU-ffff' names no GPU of this machine"),
        (FOUR, "1,1", "1 and 1 name the same GPU"),
        (FOUR, "1,GPU-aaaa2", "1 and GPU-aaaa2 name the same GPU"),
        (FOUR, "٢", "names no GPU of this machine"),
        (SLICED, "0", "GPU 0 is split into MIG slices"),
        (machine(), "0", "this machine has no GPU that the launcher can see"),
    ],
)
def test_an_entry_that_cuda_silently_ignores_is_an_error_that_lists_all_gpus(
    hardware: Hardware, value: str, problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        visible(hardware, value)
    assert str(caught.value).startswith("CUDA_VISIBLE_DEVICES: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    for gpu in hardware.gpus:
        assert gpu.uuid in str(caught.value)


@given(st.text(alphabet="0123456789-,GPUMIGabc ") | st.text())
def test_any_value_gives_gpus_or_a_one_line_error(value: str) -> None:
    try:
        assert set(visible(FOUR, value).gpus) <= set(FOUR.gpus)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either outcome is right


def mixed() -> Hardware:
    a10g = msgspec.structs.replace(FOUR.gpus[1], name="NVIDIA A10G", compute_capability=(8, 6))
    two_models = (FOUR.gpus[0], a10g, *FOUR.gpus[2:])
    return msgspec.structs.replace(FOUR, gpus=two_models, warnings=("kept", *gpus.cautions(two_models)))


def test_the_warning_about_different_gpus_goes_when_the_visible_ones_are_equal() -> None:
    assert "3 x NVIDIA L4, 1 x NVIDIA A10G" in mixed().warnings[1]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in mixed().warnings[1]
    assert visible(mixed(), "0,2").warnings == ("kept",)
    assert visible(mixed(), "0,1").warnings[1].startswith("the GPUs differ (1 x NVIDIA L4, 1 x NVIDIA A10G)")


def test_equal_gpus_are_grouped_in_order_of_appearance() -> None:
    two_models = mixed().gpus
    larger = msgspec.structs.replace(two_models[3], memory_total=2 * GIB)
    assert alike((*two_models[:3], larger)) == ((two_models[0], two_models[2]), (two_models[1],), (larger,))
    assert alike(()) == ()


@pytest.mark.parametrize("driver", ["580.159.04", "580", "595.1", None, "unknown", ""])
def test_a_new_or_unknown_driver_gives_no_warning(driver: str | None) -> None:
    assert driver_too_old(driver) is None


@pytest.mark.parametrize("driver", ["579.99", "535.104.05", "470"])
def test_the_warning_about_an_old_driver_has_both_remedies(driver: str) -> None:
    text = driver_too_old(driver)
    assert text is not None
    for words in (driver, "580", "CUDA 13.0", "cuda-compat-13-0", "VLLM_ENABLE_CUDA_COMPATIBILITY=1"):
        assert words in text


@pytest.mark.parametrize(
    ("capability", "old"), [((7, 0), True), ((6, 1), True), ((7, 5), False), ((12, 0), False), ((0, 0), False)]
)
def test_a_gpu_that_is_too_old_gives_a_reason(capability: tuple[int, int], *, old: bool) -> None:
    text = gpu_too_old(msgspec.structs.replace(FOUR.gpus[2], compute_capability=capability))
    assert (text is not None) is old
    if text:
        assert "GPU 2 (NVIDIA L4)" in text
        assert "7.5" in text


def test_importing_this_module_loads_neither_nvml_nor_torch() -> None:
    program = "import sys, vllm_launch.machine.gpus; print([name for name in ('pynvml', 'torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
