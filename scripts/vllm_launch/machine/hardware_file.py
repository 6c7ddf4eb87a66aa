"""Writes and reads hardware files: JSON from `vllm-launch gpus --format json`, for `--hardware FILE`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu, Hardware, cautions
from vllm_launch.units import GIB, MIB

_REMEDY = "write the file with `vllm-launch gpus --format json` on the machine that it describes"
_MAX_FILE_BYTES = 16 * MIB  # a machine of 64 GPUs needs 40 KB
_GPU_MEMORIES = range(GIB, (1 << 44) + 1)  # valid memory of one GPU, bytes; a number outside has the wrong unit


def dump_hardware(hardware: Hardware) -> bytes:
    """Return the content of a hardware file: indented JSON with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(hardware), indent=2) + b"\n"


def load_hardware(path: str | Path) -> Hardware:
    """Read the machine that a hardware file describes. Its ``source`` is ``path``.

    There are two layouts: the one of ``dump_hardware``, and the record of NVML's answers in tests/data/hardware
    (``gpus[].mem_v2``, or "ERR:..." if NVML gave no answer). Raises UsageError with the file, the JSON path and the
    remedy.
    """
    data = _read(Path(path))
    try:
        layout = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(str(path), f"not JSON ({error})", _REMEDY) from error
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"not UTF-8 text ({error.reason})", _REMEDY) from error
    try:
        if _is_record(layout):
            hardware = _from_record(msgspec.convert(layout, _Record))
        else:
            hardware = msgspec.convert(layout, Hardware)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        problem = problem.removeprefix("Object ").replace("Expected ", "expected ")  # the start of msgspec's messages
        raise UsageError(f"{path}: {where.strip('`') or '$'}", problem, _REMEDY) from error
    for where, problem in _mistakes(hardware):
        raise UsageError(f"{path}: {where}", problem, _REMEDY)
    return msgspec.structs.replace(hardware, source=str(path))


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(str(path), "is a directory, not a hardware file", _REMEDY)
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(str(path).replace("\0", "?"), f"cannot be read ({reason})", _REMEDY) from error
    if not data.strip():
        raise UsageError(str(path), "is empty", _REMEDY)
    if len(data) > _MAX_FILE_BYTES:
        raise UsageError(
            str(path), f"is larger than {_MAX_FILE_BYTES >> 20} MiB, so it is not a hardware file", _REMEDY
        )
    return data


def _mistakes(hardware: Hardware) -> Iterator[tuple[str, str]]:
    """Yield (JSON path, what is wrong) for each value that no machine can have."""
    for place, gpu in enumerate(hardware.gpus):
        yield from _gpu_mistakes(f"$.gpus[{place}]", gpu, hardware.gpus[:place])
    for name, matrix in (("nvlink", hardware.nvlink), ("p2p", hardware.p2p)):
        if matrix and {len(matrix), *map(len, matrix)} != {len(hardware.gpus)}:
            yield f"$.{name}", f"must have {len(hardware.gpus)} rows and columns, one for each GPU"
    cpu = hardware.cpu
    if cpu is not None and (cpu.cores < 1 or cpu.memory_total < 1):
        yield "$.cpu", "cores and memory_total must be above 0"
    if cpu is not None and not 0 <= cpu.memory_available <= cpu.memory_total:
        yield "$.cpu.memory_available", f"{cpu.memory_available} is not between 0 and memory_total ({cpu.memory_total})"


def _gpu_mistakes(path: str, gpu: Gpu, earlier: Sequence[Gpu]) -> Iterator[tuple[str, str]]:
    """Yield the same for ``gpu``, whose JSON path is ``path``.

    Slices of one GPU share its index. Two whole GPUs never share an index, and a UUID is always unique.
    """
    if gpu.memory_total not in _GPU_MEMORIES:
        yield f"{path}.memory_total", f"{gpu.memory_total} bytes cannot be the memory of a GPU"
    if not 0 <= gpu.memory_free <= gpu.memory_total:
        yield f"{path}.memory_free", f"{gpu.memory_free} is not between 0 and memory_total ({gpu.memory_total})"
    if not gpu.uuid or gpu.uuid in {other.uuid for other in earlier}:
        yield f"{path}.uuid", f"{gpu.uuid!r} is {'used twice' if gpu.uuid else 'empty'}"
    if min(gpu.compute_capability) < 0 or gpu.index < 0:
        yield path, "index and compute_capability cannot be negative"
    if any(other.index == gpu.index and None in {other.mig_profile, gpu.mig_profile} for other in earlier):
        yield f"{path}.index", f"{gpu.index} is used twice"
    if not gpu.name.strip() or not gpu.name.isprintable():
        yield f"{path}.name", f"{gpu.name!r} cannot be the name of a GPU"


# The layout of a record of NVML's answers. A field without an answer is the string "ERR:<NVML's error>".


class _RecordedMemory(msgspec.Struct, frozen=True):
    total: int
    free: int
    reserved: int = 0


class _RecordedGpu(msgspec.Struct, frozen=True):
    name: str
    uuid: str
    cc: tuple[int, int]
    mem: _RecordedMemory | str = "ERR"
    mem_v2: _RecordedMemory | str = "ERR"
    mig: tuple[int, int] | str = "ERR"
    pci: str | None = None
    p2p_read: tuple[int | str | None, ...] = ()
    p2p_nvlink: tuple[int | str | None, ...] = ()


class _Record(msgspec.Struct, frozen=True):
    gpus: tuple[_RecordedGpu, ...]
    driver: str | None = None
    cuda: int | str | None = None


def _is_record(layout: Any) -> bool:
    gpus = layout.get("gpus") if isinstance(layout, dict) else None
    return isinstance(gpus, list) and any(isinstance(gpu, dict) and ("mem_v2" in gpu or "mem" in gpu) for gpu in gpus)


def _from_record(record: _Record) -> Hardware:
    gpus = []
    for index, gpu in enumerate(record.gpus):
        if isinstance(gpu.mig, tuple) and gpu.mig[0]:
            raise msgspec.ValidationError(
                f"MIG is enabled, but the file lists no MIG slices - at `$.gpus[{index}].mig`"
            )
        memory = gpu.mem if isinstance(gpu.mem_v2, str) else gpu.mem_v2
        if isinstance(memory, str):
            raise msgspec.ValidationError(
                f"NVML did not report the memory ({gpu.mem_v2}) - at `$.gpus[{index}].mem_v2`"
            )
        gpus.append(
            Gpu(
                index=index,
                uuid=gpu.uuid,
                name=gpu.name,
                memory_total=memory.total - memory.reserved,
                memory_free=memory.free,
                compute_capability=gpu.cc,
                pci_bus_id=gpu.pci,
            )
        )
    # NVML_P2P_STATUS_OK is 0. The diagonal is null.
    nvlink, p2p = (
        tuple(tuple(status == 0 for status in row) for row in matrix)
        for matrix in ([gpu.p2p_nvlink for gpu in record.gpus], [gpu.p2p_read for gpu in record.gpus])
    )
    return Hardware(
        gpus=tuple(gpus),
        nvlink=nvlink if any(nvlink) else (),
        p2p=p2p if any(p2p) else (),
        driver=None if (record.driver or "").startswith("ERR") else record.driver,
        cuda=(record.cuda // 1000, record.cuda % 1000 // 10) if isinstance(record.cuda, int) else None,
        warnings=cautions(tuple(gpus)),
    )
