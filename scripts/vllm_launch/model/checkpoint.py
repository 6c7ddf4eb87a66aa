"""Reads what is small in a model's folder: JSON and safetensors headers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from vllm_launch.errors import UsageError
from vllm_launch.model.config import parse_json, shown
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.model import Tensor

HEADER_LIMIT = 100_000_000
"""Bytes; safetensors' own (safetensors/src/tensor.rs: MAX_HEADER_SIZE)."""

JSON_LIMIT = 256 * 2**20
"""Bytes of a config or an index; the largest index known is a tenth of it."""

SMALL_FILES = ("hf_quant_config.json", "tokenizer_config.json", "sentence_bert_config.json")
OTHER_WEIGHTS = {"bin": "PyTorch pickles", "pt": "PyTorch pickles", "pth": "PyTorch pickles", "gguf": "GGUF"}
DOWNLOAD = "download the file again (`hf download`)"


class Checkpoint:
    """What was found: ``files`` are the small JSON files by name, ``tensors`` is None where there are no weights."""

    def __init__(
        self,
        path: Path | None,
        files: dict[str, dict[str, Any]],
        tensors: tuple[Tensor, ...] | None,
        warnings: Sequence[str],
    ) -> None:
        self.path, self.files, self.tensors, self.warnings = path, files, tensors, tuple(warnings)


def read_folder(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``.

    Raises:
        UsageError: its files are broken, not all there, or in a form that vLLM does not read.
    """
    config = folder / "config.json"
    if not config.is_file():
        what = (
            "has only params.json (Mistral's own format)"
            if (folder / "params.json").is_file()
            else "has no config.json"
        )
        raise UsageError(f"model {folder}", what, "give the folder of a model in the Hugging Face format")
    files = {"config.json": read_json(config)}
    for name in SMALL_FILES:
        if (folder / name).is_file():
            files[name] = read_json(folder / name)
    if names := shards(folder):
        return Checkpoint(folder, files, read_headers([folder / name for name in names]), ())
    others = sorted({path.suffix[1:] for path in _listing(folder)} & OTHER_WEIGHTS.keys())
    others = [
        suffix
        for suffix in others
        if any(p.suffix == f".{suffix}" and p.stat().st_size > 2**16 for p in _listing(folder))
    ]
    if others:
        found = " and ".join(sorted({OTHER_WEIGHTS[suffix] for suffix in others}))
        remedy = (
            "convert it to safetensors (transformers' save_pretrained), or take the safetensors upload of the model"
        )
        raise UsageError(f"model {folder}", f"its weights are {found}, not safetensors", remedy)
    return Checkpoint(folder, files, None, ())


def shards(folder: Path) -> list[str]:
    """Names of the safetensors files that vLLM loads from ``folder``."""
    index = folder / "model.safetensors.index.json"
    present = sorted(path.name for path in _listing(folder) if path.name.endswith(".safetensors"))
    if index.is_file():
        names = shard_names(read_json(index), str(index))
        _all_there(str(index), folder, names, present)
        return names
    # vllm/model_executor/model_loader/weight_utils.py:filter_duplicate_safetensors_files wants the one set;
    # Mistral's repositories hold the same weights again as consolidated.safetensors.
    names = [name for name in present if not name.startswith("consolidated")] or present
    linked = [path.name for path in folder.glob("*.safetensors") if path.is_symlink()]  # to the hub's cache
    _all_there(f"model {folder}", folder, sorted({*_by_their_numbers(names), *linked}), present)
    return names


def _by_their_numbers(names: Iterable[str]) -> list[str]:
    """Every shard of the sets that ``names`` are of: "model-00002-of-00003.safetensors" is one of three."""
    found: dict[str, None] = {}
    for name in names:
        numbered = re.fullmatch(r"(.*-)(\d+)(-of-(\d{1,5})\.safetensors)", name)
        if numbered:
            start, number, end, count = numbered.groups()
            found |= {f"{start}{place:0{len(number)}}{end}": None for place in range(1, int(count) + 1)}
    return list(found)


def _all_there(where: str, folder: Path, shards: Sequence[str], present: Sequence[str]) -> None:
    """Refuse a download that was broken off."""
    missing = [name for name in shards if name not in present]
    if missing:
        count = f"{len(missing)} of its {len(shards)} shards are not in {folder}: {', '.join(missing[:3])}"
        raise UsageError(where, count, "finish the download (`hf download`)")


def _listing(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise UsageError(f"model {folder}", f"cannot be read ({error.strerror})", "check its permissions") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return parse_json(_bytes(path, JSON_LIMIT), str(path))


def _bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from None
    if len(data) > limit:
        raise UsageError(str(path), f"is larger than {limit} bytes", "give the model's own file")
    return data


def shard_names(index: dict[str, Any], where: str) -> list[str]:
    """The files that an index names, each a plain name in the same folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(
            f"{where} key 'weight_map'", f"is {shown(weight_map)}, not a map of tensors to files", DOWNLOAD
        )
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\0" in name:
            raise UsageError(
                f"{where} key 'weight_map'", f"names {shown(name)}, not a safetensors file beside it", DOWNLOAD
            )
        names.add(name)
    return sorted(names)


def read_headers(paths: Iterable[Path]) -> tuple[Tensor, ...]:
    """Every tensor of these files. No weights are read.

    Raises:
        UsageError: a file is not what safetensors writes, or two files hold the same tensor.
    """
    found: dict[str, tuple[Tensor, Path]] = {}
    for path in paths:
        for tensor in read_header(path):
            if tensor.name in found:
                first = found[tensor.name][1].name
                raise UsageError(
                    str(path), f"tensor {shown(tensor.name)} is also in {first}", "keep one set of weights"
                )
            found[tensor.name] = tensor, path
    return tuple(tensor for tensor, _ in found.values())


def read_header(path: Path) -> tuple[Tensor, ...]:
    """The tensors of one file, from its first bytes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start == b"version ":
                remedy = "run `git lfs pull` in the model's folder"
                raise UsageError(str(path), "is a Git LFS pointer, not the weights", remedy)
            if len(start) < 8:  # noqa: PLR2004 - the header's length is a little-endian u64
                raise UsageError(str(path), f"is cut off: it has {size} bytes", DOWNLOAD)
            length = int.from_bytes(start, "little")
            if length > min(HEADER_LIMIT, size - 8):
                raise UsageError(str(path), f"says its header has {length} bytes but the file has {size}", DOWNLOAD)
            header = file.read(length)
    except OSError as error:
        raise UsageError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from None
    return parse_header(header, str(path), size - 8 - length)


def parse_header(header: bytes, where: str, data_bytes: int) -> tuple[Tensor, ...]:
    """The tensors that a header describes; together they must fill ``data_bytes`` exactly, as safetensors demands."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise UsageError(where, "names a tensor or a field twice in its header", DOWNLOAD)
        return value

    try:
        entries = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise UsageError(where, "its header is not JSON in UTF-8", DOWNLOAD) from None
    if not isinstance(entries, dict):
        raise UsageError(where, "its header is not an object", DOWNLOAD)
    entries.pop("__metadata__", None)
    tensors, spans = [], []
    for name, entry in entries.items():
        tensor, span = _entry(name, entry, where)
        tensors.append(tensor)
        spans.append((*span, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            fault = "overlaps another" if begin < reached else "leaves a hole before it"
            raise UsageError(where, f"tensor {shown(name)} {fault} at byte {begin}", DOWNLOAD)
        reached = end
    if reached != data_bytes:
        fault = f"its tensors take {reached} bytes but it holds {data_bytes}"
        raise UsageError(where, fault, DOWNLOAD)
    return tuple(tensors)


def _entry(name: str, entry: Any, where: str) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict):
        raise UsageError(where, f"tensor {shown(name)} is {shown(entry)}, not an object", DOWNLOAD)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in STORED_BITS:
        raise UsageError(where, f"tensor {shown(name)} has the unknown dtype {shown(dtype)}", DOWNLOAD)
    if not _sizes(shape):
        raise UsageError(where, f"tensor {shown(name)} has the shape {shown(shape)}", DOWNLOAD)
    if not _sizes(offsets) or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        raise UsageError(where, f"tensor {shown(name)} has the offsets {shown(offsets)}", DOWNLOAD)
    bits = STORED_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > 2**80:
            break
    if offsets[1] - offsets[0] != (bits + 7) // 8:
        size = offsets[1] - offsets[0]
        fault = f"tensor {shown(name)} of {dtype} {shown(shape)} has {size} bytes, which does not match its shape"
        raise UsageError(where, fault, DOWNLOAD)
    return Tensor(name, dtype, tuple(shape)), (offsets[0], offsets[1])


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
