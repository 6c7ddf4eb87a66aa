from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_launch.errors import UsageError
from vllm_launch.machine.catalogue import parse_hardware_name
from vllm_launch.machine.gpus import Hardware
from vllm_launch.machine.hardware_file import dump_hardware, load_hardware
from vllm_launch.machine.known_gpus import DROPPED, ENTRIES

MIB = 1 << 20
# Total memory in nvidia-smi, MiB (NVIDIA's data sheets and nvidia-smi). CUDA's total is a little less.
NVIDIA_SMI_MIB = {
    "T4": 15360,
    "A10G": 23028,
    "L4": 23034,
    "L40S": 46068,
    "RTX 4090": 24564,
    "RTX 5090": 32607,
    "A40": 46068,
    "L20": 46068,
    "L40": 46068,
    "RTX 3090": 24576,
    "RTX A6000": 49140,
    "RTX 6000 Ada": 49140,
    "RTX PRO 6000 Server": 97887,
    "RTX PRO 6000 Workstation": 97887,
    "RTX PRO 6000 Max-Q": 97887,
    "A100-40GB": 40960,
    "A100-80GB": 81920,
    "A100-40GB PCIe": 40960,
    "A100-80GB PCIe": 81920,
    "H20": 97871,
    "H100": 81559,
    "H100 PCIe": 81559,
    "H100 NVL": 95830,
    "H200": 143771,
    "H200 NVL": 143771,
    "GH200-96GB": 97871,
    "GH200-144GB": 146831,
    "B200": 183359,
    "B300": 275040,
    "GB200": 189471,
    "GB300": 284208,
}


@pytest.mark.parametrize(
    ("name", "nvml_name", "memory"),
    [("H200", "NVIDIA H200", 150109880320), ("H100", "NVIDIA H100 80GB HBM3", 85017493504)],
)
def test_memory_of_measured_gpus_is_exact_to_the_byte(name: str, nvml_name: str, memory: int) -> None:
    gpu = parse_hardware_name(name).gpus[0]
    assert gpu.memory_total == gpu.memory_free == memory
    assert gpu.name == nvml_name


@pytest.mark.parametrize("name", NVIDIA_SMI_MIB)
def test_memory_is_the_total_of_nvidia_smi_less_a_small_reserve(name: str) -> None:
    reserve = NVIDIA_SMI_MIB[name] - parse_hardware_name(name).gpus[0].memory_total / MIB
    assert 100 < reserve < 1200


def test_every_whole_gpu_with_its_own_memory_is_compared_with_nvidia_smi() -> None:
    own = {key for key, entry in ENTRIES.items() if "g." not in key and entry.idle is None}
    assert own == NVIDIA_SMI_MIB.keys()


@pytest.mark.parametrize(("name", "gib"), [("GB10", 121.69), ("Jetson Thor", 122.8)])
def test_a_gpu_inside_a_processor_has_the_hosts_memory_of_which_some_is_in_use(name: str, gib: float) -> None:
    gpu = parse_hardware_name(name).gpus[0]
    assert gpu.unified
    assert gpu.memory_total == round(gib * 1024 * MIB)
    assert 0.9 * gpu.memory_total < gpu.memory_free < 0.97 * gpu.memory_total


@pytest.mark.parametrize("name", [name for name in ENTRIES if "g." in name])
def test_a_slice_has_at_most_its_share_of_the_gpus_memory(name: str) -> None:
    parent, profile = name.rsplit("-", 1)
    whole = ENTRIES[parent].memory
    eighths = {
        "A100-40GB": {"5gb": 1, "10gb": 2, "20gb": 4, "40gb": 8},
        "H200": {"18gb": 1, "35gb": 2, "71gb": 4, "141gb": 8},
    }.get(parent, {"10gb": 1, "20gb": 2, "40gb": 4, "80gb": 8})
    share = whole * eighths[profile.split(".")[1]] / 8
    assert share * 0.91 < ENTRIES[name].memory <= min(whole, share + 0.2)
    hardware = parse_hardware_name(name)
    assert hardware.gpus[0].mig_profile == profile
    assert hardware.gpus[0].uuid.startswith("MIG-")
    assert hardware.gpus[0].compute_capability == ENTRIES[parent].compute_capability


def test_every_row_has_a_source() -> None:
    assert all(len(entry.source) > 10 for entry in ENTRIES.values())
    assert "derived" in ENTRIES["H100-7g.80gb"].source


@pytest.mark.parametrize(
    ("name", "capability", "nvlink", "p2p"),
    [
        ("T4", (7, 5), False, True),
        ("A10G", (8, 6), False, True),
        ("L4", (8, 9), False, True),
        ("L40S", (8, 9), False, True),
        ("RTX 4090", (8, 9), False, False),
        ("RTX 5090", (12, 0), False, False),
        ("A100-40GB", (8, 0), True, True),
        ("A100-80GB", (8, 0), True, True),
        ("H100", (9, 0), True, True),
        ("H200", (9, 0), True, True),
        ("B200", (10, 0), True, True),
        ("GH200-144GB", (9, 0), True, True),
        ("B300", (10, 3), True, True),
        ("RTX PRO 6000", (12, 0), False, True),
        ("RTX A6000", (8, 6), False, True),
        ("RTX 6000 Ada", (8, 9), False, True),
        ("RTX 3090", (8, 6), False, False),
        ("H20", (9, 0), True, True),
        ("GB10", (12, 1), False, False),
        ("H100-1g.10gb", (9, 0), False, False),
    ],
)
def test_a_gpu_has_the_capability_and_links_of_its_model(
    name: str, capability: tuple[int, int], *, nvlink: bool, p2p: bool
) -> None:
    hardware = parse_hardware_name(f"{name}:2")
    assert hardware.gpus[0].compute_capability == capability
    assert hardware.nvlink == ((False, nvlink), (nvlink, False))
    assert hardware.p2p == ((False, p2p), (p2p, False))
    assert hardware.source == "catalogue"


def test_each_gpu_has_its_own_index_and_a_well_formed_uuid() -> None:
    gpus = parse_hardware_name("H100:64").gpus
    assert [gpu.index for gpu in gpus] == list(range(64))
    assert len({gpu.uuid for gpu in gpus}) == 64
    assert all(re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", gpu.uuid) for gpu in gpus)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100:8", "H100"),
        ("NVIDIA H100 80GB HBM3:8", "H100"),
        ("H100-80GB", "H100"),
        ("H100-SXM5", "H100"),
        ("NVIDIA L4:2", "L4"),
        ("rtx4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("GeForce RTX 5090", "RTX 5090"),
        ("5090", "RTX 5090"),
        ("tesla_t4", "T4"),
        ("rtx pro 6000", "RTX PRO 6000 Server"),
        ("RTX PRO 6000 Blackwell Max-Q", "RTX PRO 6000 Max-Q"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition:2", "RTX PRO 6000 Workstation"),
        ("A6000", "RTX A6000"),
        ("rtx6000ada", "RTX 6000 Ada"),
        ("3090", "RTX 3090"),
        ("H100 NVL", "H100 NVL"),
        ("h200 nvl", "H200 NVL"),
        ("gh200-480gb", "GH200-96GB"),
        ("GH200-144G", "GH200-144GB"),
        ("dgx-spark", "GB10"),
        ("H200-1g.18gb", "H200-1g.18gb"),
        ("a100 80gb", "A100-80GB"),
        ("A10080GB", "A100-80GB"),
        ("A100-1g.5gb", "A100-40GB-1g.5gb"),
        ("a100-80gb-3G.40GB", "A100-80GB-3g.40gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100-1g.10gb"),
        ("H100 : 8", "H100"),
    ],
)
def test_a_name_may_have_many_spellings(text: str, name: str) -> None:
    assert parse_hardware_name(text).gpus[0].name == ENTRIES[name].nvml_name


@pytest.mark.parametrize(
    ("text", "expected_parts"),
    [
        ("A100", ["matches several GPUs", "A100-40GB or A100-80GB"]),
        ("A100-1g.10gb", ["A100-40GB-1g.10gb or A100-80GB-1g.10gb"]),
        ("H10:8", ["'H10' is not in the catalogue", "H100"]),
        ("L40X", ["use L40 or L40S,"]),
        ("a6000 ada", ["use RTX 6000 Ada or RTX A6000,"]),
        ("A6OOO", ["use RTX A6000 or"]),
        ("rtx 6000", ["use RTX 6000 Ada or RTX A6000 or RTX PRO 6000 Server"]),
        ("RTX 4080", ["use RTX 4090 or"]),
        ("h100-96gb", ["use H100,"]),
        ("H2OO", ["use H200 or"]),
        ("gh200", ["matches several GPUs", "use GH200-96GB or GH200-144GB,"]),
        ("a100 pcie", ["matches several GPUs", "use A100-40GB PCIe or A100-80GB PCIe,"]),
        ("h200 mig 3g", ["use H200-3g.71gb or"]),
        ("V100", ["compute capability 7.0, but vLLM needs 7.5 (Turing) or newer", "such as T4"]),
        ("Tesla V100-SXM2-32GB:8", ["the V100 has compute capability 7.0"]),
        ("1080ti", ["the GTX 1080 Ti has compute capability 6.1"]),
        ("p100-16gb", ["the P100 has compute capability 6.0"]),
        ("MI300X", ["T4", "B200"]),
        ("", ["B200"]),
        (":8", ["B200"]),
        ("H100-1g.11gb", ["H100-1g.10gb"]),
        ("H100:0", ["'0' is not a valid number", "1 to 64"]),
        ("H100:65", ["'65' is not a valid number", "1 to 64"]),
        ("H100:", ["'' is not a valid number"]),
        ("H100:-1", ["'-1' is not a valid number"]),
        ("H100:8:8", ["'8:8' is not a valid number"]),
        ("H100:eight", ["'eight' is not a valid number"]),
        ("H100:٨", ["is not a valid number"]),
        ("H100:" + "9" * 5000, ["is not a valid number"]),
    ],
)
def test_the_error_for_an_unknown_name_or_count_lists_valid_ones(text: str, expected_parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_hardware_name(text)
    assert "\n" not in str(caught.value)
    for part in expected_parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", DROPPED)
def test_a_gpu_that_vllm_has_dropped_is_told_so(name: str) -> None:
    with pytest.raises(UsageError, match=r"but vLLM needs 7\.5"):
        parse_hardware_name(name)


def test_several_mig_slices_give_a_warning_that_a_replica_gets_one() -> None:
    assert "only one MIG slice" in parse_hardware_name("H100-1g.10gb:2").warnings[0]
    assert parse_hardware_name("H100:2").warnings == ()


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_unchanged_after_writing_and_reading_a_file(name: str, tmp_path) -> None:
    hardware = parse_hardware_name(f"{name}:3")
    (tmp_path / "hardware.json").write_bytes(dump_hardware(hardware))
    read = load_hardware(tmp_path / "hardware.json")
    assert (read.gpus, read.nvlink, read.p2p) == (hardware.gpus, hardware.nvlink, hardware.p2p)


@given(st.text() | st.from_regex(r"(H100|A100|L4|rtx ?[45]090)[-: 0-9a-z.]*"))
def test_any_text_gives_a_machine_or_a_one_line_error(text: str) -> None:
    try:
        assert isinstance(parse_hardware_name(text), Hardware)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either outcome is right


@pytest.mark.parametrize("text", ["H100x8", "H100 x 8", "H100*8", "8xH100", "8 x H100"])
def test_a_number_of_gpus_is_written_after_a_colon(text):
    with pytest.raises(UsageError, match="write the number of GPUs after a colon: H100:8"):
        parse_hardware_name(text)


@pytest.mark.parametrize("text", ["RTX 4090", "RTX4090:2", "RTX 6000 Ada"])
def test_the_letter_x_in_a_name_is_no_number_of_gpus(text):
    assert parse_hardware_name(text).gpus
