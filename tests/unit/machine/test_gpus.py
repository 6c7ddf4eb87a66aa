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
    told = None if memory is None else gpu_facts.Memory(total=memory, reserved=0, free=memory, used=0)
    return gpu_facts.MigSlice(
        uuid=uuid, name=f"NVIDIA H100 MIG {profile}", profile=profile, memory=told, processes=None
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


def test_a_real_machines_snapshot_is_what_cuda_told_there() -> None:
    seen = msgspec.json.decode((DATA / "snapshot-h100.json").read_bytes(), type=gpu_facts.Snapshot)
    hardware = from_snapshot(seen)
    assert hardware.gpus[0].memory_total == 85017493504  # torch.cuda.mem_get_info()[1] in the same minute
    assert hardware.gpus[0].memory_total == parse_hardware_name("H100").gpus[0].memory_total
    assert (hardware.driver, hardware.cuda, hardware.p2p, hardware.warnings) == (
        "580.159.04",
        (13, 0),
        ((False,),),
        (),
    )


def test_total_is_less_the_reserve_and_free_is_nvmls_simulated() -> None:
    gpu = from_snapshot(snapshot(device(0))).gpus[0]
    assert (gpu.memory_total, gpu.memory_free) == (23 * GIB, 20 * GIB)
    old = gpu_facts.Memory(total=24 * GIB, reserved=None, free=20 * GIB, used=4 * GIB)
    assert from_snapshot(snapshot(device(0, memory=old))).gpus[0].memory_total == 24 * GIB


def test_others_on_the_gpu_are_named_simulated() -> None:
    others = (
        gpu_facts.Process(pid=9, name="/usr/bin/python3", memory=3 * GIB),
        gpu_facts.Process(pid=10, name=None, memory=None),
    )
    seen = from_snapshot(snapshot(device(0, processes=others))).gpus[0].processes
    assert seen == (
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
def test_a_pair_are_peers_only_if_nvml_says_so_both_ways_simulated(
    pair: gpu_facts.P2P | None, *, nvlink: bool, p2p: bool
) -> None:
    hardware = from_snapshot(snapshot(device(0), device(1), pair=pair))
    assert hardware.nvlink == ((False, nvlink), (nvlink, False))
    assert hardware.p2p == ((False, p2p), (p2p, False))


def test_slices_stand_in_for_a_gpu_with_mig_simulated() -> None:
    split = device(0, memory=None, mig_enabled=True, mig_slices=(part("MIG-a", "1g.10gb"), part("MIG-b", "3g.40gb")))
    hardware = from_snapshot(snapshot(split, device(1)))
    assert [(gpu.index, gpu.uuid, gpu.mig_profile) for gpu in hardware.gpus] == [
        (0, "MIG-a", "1g.10gb"),
        (0, "MIG-b", "3g.40gb"),
        (1, "GPU-10000000-aaaa", None),
    ]
    assert hardware.gpus[0].compute_capability == (8, 9)
    assert hardware.p2p[0] == (False, False, True)
    assert any("one MIG slice only" in text for text in hardware.warnings)


def test_gpus_that_cannot_be_used_are_left_out_and_told_of_simulated() -> None:
    empty = device(0, memory=None, mig_enabled=True, mig_slices=(part("MIG-a", "1g.10gb", None),))
    mute = device(1, memory=None)
    hardware = from_snapshot(snapshot(empty, mute, device(2), lost=((3, "GPU is lost"),)))
    assert [gpu.index for gpu in hardware.gpus] == [2]
    assert hardware.p2p == ((False,),)
    assert [text for text in hardware.warnings if "GPU 0 " in text and "nvidia-smi mig" in text]
    assert [text for text in hardware.warnings if "GPU 1 " in text and "--hardware" in text]
    assert "GPU 3 is left out: GPU is lost" in hardware.warnings


def test_the_numa_node_is_the_kernels_simulated(tmp_path: Path) -> None:
    for bus, node in [("0000:00:00.0", "1\n"), ("0000:01:00.0", "-1\n"), ("0000:02:00.0", "?")]:
        (tmp_path / "sys/bus/pci/devices" / bus).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / bus / "numa_node").write_text(node)
    seen = snapshot(*(device(index) for index in range(4)), device(4, pci_bus_id=None))
    assert [gpu.numa_node for gpu in from_snapshot(seen, tmp_path).gpus] == [1, None, None, None, None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"ecc": gpu_facts.Ecc(volatile=None)}, []),
        ({"ecc": gpu_facts.Ecc(volatile=3)}, ["3 uncorrectable ECC errors"]),
        ({"remapped_rows": (1, 1, False, False)}, []),
        ({"remapped_rows": (0, 1, True, False)}, ["reset the GPU"]),
        ({"remapped_rows": (0, 1, False, True)}, ["replace the GPU"]),
        (
            {"remapped_rows": (0, 1, True, True), "ecc": gpu_facts.Ecc(volatile=1)},
            ["replace", "reset", "1 uncorrectable"],
        ),
    ],
)
def test_faults_are_sentences_with_a_remedy_simulated(changes: dict[str, Any], words: list[str]) -> None:
    if rows := changes.pop("remapped_rows", None):
        names = ("correctable", "uncorrectable", "pending", "failure")
        changes = {**changes, "remapped_rows": gpu_facts.RemappedRows(**dict(zip(names, rows, strict=True)))}
    found = faults(device(0, **changes))
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
    assert from_snapshot(snapshot(device(0, **changes))).gpus[0].faults == found


class Unusable:
    NVMLError = pynvml.NVMLError

    def nvmlInit(self) -> None:  # noqa: N802  the binding's name
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


class Empty:
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
@pytest.mark.parametrize(("binding", "why"), [(Unusable(), "install the NVIDIA driver"), (Empty(), "NVML shows none")])
def test_without_gpus_a_machine_warns_only_if_it_looks_like_it_has_some_simulated(
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


def test_a_machine_with_gpus_has_its_cpu_facts_too_simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    binding = Empty()
    memory = SimpleNamespace(total=2 * GIB, reserved=GIB, free=GIB, used=0)
    answers = {"DeviceGetCount": 1, "DeviceGetMemoryInfo": memory, "DeviceGetName": "NVIDIA L4"}
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
    found = tuple(
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
    # Each pair is joined or not by a rule of its own, so that a wrong cut shows.
    linked = tuple(tuple(a != b and (a + b) % 2 == 1 for b in range(len(found))) for a in range(len(found)))
    peers = tuple(tuple(a < b for b in range(len(found))) for a in range(len(found)))
    return Hardware(gpus=found, nvlink=linked, p2p=peers, driver="580.1")


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
def test_cuda_visible_devices_leaves_the_named_gpus_in_its_order(value: str | None, places: list[int]) -> None:
    seen = visible(FOUR, value)
    assert seen.gpus == tuple(FOUR.gpus[place] for place in places)
    assert seen.nvlink == tuple(tuple(FOUR.nvlink[a][b] for b in places) for a in places)
    assert seen.p2p == tuple(tuple(FOUR.p2p[a][b] for b in places) for a in places)
    assert seen.driver == "580.1"


def test_a_machine_without_matrices_stays_without() -> None:
    bare = msgspec.structs.replace(FOUR, nvlink=(), p2p=())
    assert visible(bare, "1").nvlink == visible(bare, "1").p2p == ()


def test_a_slice_is_named_by_its_uuid() -> None:
    assert [gpu.uuid for gpu in visible(SLICED, "MIG-bbbb").gpus] == ["MIG-bbbb"]
    assert [gpu.uuid for gpu in visible(SLICED, "1").gpus] == ["GPU-cccc"]


@pytest.mark.parametrize(
    ("hardware", "value", "what"),
    [
        (FOUR, "4", "'4' is no GPU here"),
        (FOUR, "0,9", "'9' is no GPU here"),
        (FOUR, "-2", "'-2' is no GPU here"),
        (FOUR, "0,-1", "'-1' is no GPU here"),
        (FOUR, "0,", "'' is no GPU here"),
        (FOUR, "all", "'all' is no GPU here"),
        (FOUR, "G", "'G' is no GPU here"),
        (FOUR, "GPU-", "several UUIDs"),
        (FOUR, "GPU-aaaa", "'GPU-aaaa' is the beginning of several UUIDs"),
        (FOUR, "GPU-ffff", "'GPU-ffff' is no GPU here"),
        (FOUR, "1,1", "1 and 1 name the same GPU"),
        (FOUR, "1,GPU-aaaa2", "1 and GPU-aaaa2 name the same GPU"),
        (FOUR, "٢", "is no GPU here"),
        (SLICED, "0", "GPU 0 is split by MIG"),
        (machine(), "0", "this machine shows no GPU"),
    ],
)
def test_an_entry_that_cuda_would_silently_drop_is_an_error_naming_what_there_is(
    hardware: Hardware, value: str, what: str
) -> None:
    with pytest.raises(UsageError) as caught:
        visible(hardware, value)
    assert str(caught.value).startswith("CUDA_VISIBLE_DEVICES: ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    for gpu in hardware.gpus:
        assert gpu.uuid in str(caught.value)


@given(st.text(alphabet="0123456789-,GPUMIGabc ") | st.text())
def test_any_value_is_understood_or_one_line(value: str) -> None:
    try:
        assert set(visible(FOUR, value).gpus) <= set(FOUR.gpus)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either outcome is right


def mixed() -> Hardware:
    other = msgspec.structs.replace(FOUR.gpus[1], name="NVIDIA A10G", compute_capability=(8, 6))
    found = (FOUR.gpus[0], other, *FOUR.gpus[2:])
    return msgspec.structs.replace(FOUR, gpus=found, warnings=("kept", *gpus.cautions(found)))


def test_gpus_that_differ_are_cautioned_about_until_the_rest_are_alike() -> None:
    assert "3 x NVIDIA L4, 1 x NVIDIA A10G" in mixed().warnings[1]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in mixed().warnings[1]
    assert visible(mixed(), "0,2").warnings == ("kept",)
    assert visible(mixed(), "0,1").warnings[1].startswith("the GPUs differ (1 x NVIDIA L4, 1 x NVIDIA A10G)")


def test_alike_gpus_are_grouped_in_order() -> None:
    found = mixed().gpus
    larger = msgspec.structs.replace(found[3], memory_total=2 * GIB)
    assert alike((*found[:3], larger)) == ((found[0], found[2]), (found[1],), (larger,))
    assert alike(()) == ()


@pytest.mark.parametrize("driver", ["580.159.04", "580", "595.1", None, "unknown", ""])
def test_a_driver_that_runs_the_engine_or_is_unknown_is_not_complained_of(driver: str | None) -> None:
    assert driver_too_old(driver) is None


@pytest.mark.parametrize("driver", ["579.99", "535.104.05", "470"])
def test_a_driver_too_old_is_told_with_both_remedies(driver: str) -> None:
    text = driver_too_old(driver)
    assert text is not None
    for part_ in (driver, "580", "CUDA 13.0", "cuda-compat-13-0", "VLLM_ENABLE_CUDA_COMPATIBILITY=1"):
        assert part_ in text


@pytest.mark.parametrize(
    ("capability", "old"), [((7, 0), True), ((6, 1), True), ((7, 5), False), ((12, 0), False), ((0, 0), False)]
)
def test_a_gpu_too_old_for_the_engine_is_told(capability: tuple[int, int], *, old: bool) -> None:
    text = gpu_too_old(msgspec.structs.replace(FOUR.gpus[2], compute_capability=capability))
    assert (text is not None) is old
    if text:
        assert "GPU 2 (NVIDIA L4)" in text
        assert "7.5" in text


def test_importing_the_room_loads_neither_nvml_nor_torch() -> None:
    program = "import sys, vllm_launch.machine.gpus; print([name for name in ('pynvml', 'torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
