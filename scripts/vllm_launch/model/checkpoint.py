"""Reads the JSON files and the safetensors headers in a model's folder. Never reads weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from vllm_launch.engine.architectures import is_multimodal
from vllm_launch.errors import UsageError
from vllm_launch.model.chat import NAMED_TEMPLATES
from vllm_launch.model.config import short_repr
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.files import DOWNLOAD_AGAIN, read_json, read_small, read_template, read_tokenizer
from vllm_launch.model.model import Tensor
from vllm_launch.model.names import gguf
from vllm_launch.model.pooling import pooling_file

HEADER_LIMIT = 100_000_000
"""Upper limit of a safetensors header, in bytes (safetensors/src/tensor.rs: MAX_HEADER_SIZE)."""

SMALL_FILES = (
    "hf_quant_config.json", "tokenizer_config.json", "sentence_bert_config.json", "modules.json", "chat_template.jinja",
    "chat_template.json", "added_tokens.json",
)  # fmt: skip
TOKENIZER = "tokenizer.json"
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Files of the processor of images, videos and audio. Only models with an encoder have them."""

OTHER_WEIGHTS = {"bin": "PyTorch pickles", "pt": "PyTorch pickles", "pth": "PyTorch pickles", "gguf": "GGUF"}


class Checkpoint:
    """The files of one checkpoint.

    ``files`` are its small files by name, as JSON objects. ``tensors`` is None if it has no weights. ``names`` are the
    names of all files that are known.
    """

    def __init__(
        self,
        path: Path | None,
        files: dict[str, dict[str, Any]],
        tensors: tuple[Tensor, ...] | None,
        warnings: Sequence[str],
        names: Iterable[str] = (),
    ) -> None:
        self.path, self.files, self.tensors, self.warnings = path, files, tensors, tuple(warnings)
        self.names = frozenset(names)


def small_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the files besides config.json that describe the model with this config.json."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    has_encoder = is_multimodal(first) or any(str(key).endswith(("vision_config", "audio_config")) for key in config)
    return SMALL_FILES + (PROCESSOR_FILES if has_encoder else ())


def read_folder(folder: Path) -> Checkpoint:
    """Return the checkpoint in ``folder``.

    Raises:
        UsageError: files are broken or missing, or vLLM does not read their format.
    """
    config = folder / "config.json"
    if not config.is_file():
        if any(path.suffix == ".gguf" for path in _list_files(folder)):
            raise gguf(str(folder))
        problem = (
            "has only params.json (Mistral's own format)"
            if (folder / "params.json").is_file()
            else "has no config.json"
        )
        raise UsageError(f"model {folder}", problem, "give the folder of a model in the Hugging Face format")
    files = _files_of(folder, read_json(config))
    present = [path.name for path in _list_files(folder)]
    if names := shards(folder):
        return Checkpoint(folder, files, read_headers([folder / name for name in names]), (), present)
    suffixes = sorted({path.suffix[1:] for path in _list_files(folder)} & OTHER_WEIGHTS.keys())
    suffixes = [
        suffix
        for suffix in suffixes
        if any(p.suffix == f".{suffix}" and p.stat().st_size > 2**16 for p in _list_files(folder))
    ]
    if suffixes == ["gguf"]:
        raise gguf(str(folder))
    if suffixes:
        formats = " and ".join(sorted({OTHER_WEIGHTS[suffix] for suffix in suffixes}))
        remedy = "convert it to safetensors (transformers' save_pretrained), or use the model's safetensors checkpoint"
        raise UsageError(f"model {folder}", f"its weights are {formats}, not safetensors", remedy)
    return Checkpoint(folder, files, None, (), present)


def _files_of(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files that describe the model of ``config``, by name."""
    files = {"config.json": config}
    for name in small_files(config):
        if (folder / name).is_file():
            files[name] = read_small(folder / name)
    if (pooling := pooling_file(files)) and (folder / pooling).is_file():
        files[pooling] = read_small(folder / pooling)
    if (folder / TOKENIZER).is_file():
        files[TOKENIZER] = read_tokenizer(folder / TOKENIZER)
    if (templates := folder / NAMED_TEMPLATES).is_dir():
        files[NAMED_TEMPLATES] = {path.stem: read_template(path)["text"] for path in sorted(templates.glob("*.jinja"))}
    return files


def shards(folder: Path) -> list[str]:
    """Return the names of the safetensors files that vLLM loads from ``folder``."""
    index = folder / "model.safetensors.index.json"
    present = sorted(path.name for path in _list_files(folder) if path.name.endswith(".safetensors"))
    if index.is_file():
        names = shard_names(read_json(index), str(index))
        _check_complete(str(index), folder, names, present)
        return names
    # vLLM loads one set of weights (model_executor/model_loader/weight_utils.py:filter_duplicate_safetensors_files).
    # Mistral's repositories hold the same weights a second time, as consolidated.safetensors.
    names = [name for name in present if not name.startswith("consolidated")] or present
    linked = [path.name for path in folder.glob("*.safetensors") if path.is_symlink()]  # links into the hub's cache
    _check_complete(f"model {folder}", folder, sorted({*_complete_sets(names), *linked}), present)
    return names


def _complete_sets(names: Iterable[str]) -> list[str]:
    """Return all shards of each numbered set in ``names``. "model-00002-of-00003.safetensors" means a set of 3."""
    shards: dict[str, None] = {}
    for name in names:
        match = re.fullmatch(r"(.*-)(\d+)(-of-(\d{1,5})\.safetensors)", name)
        if match:
            start, number, end, count = match.groups()
            shards |= {f"{start}{place:0{len(number)}}{end}": None for place in range(1, int(count) + 1)}
    return list(shards)


def _check_complete(where: str, folder: Path, shards: Sequence[str], present: Sequence[str]) -> None:
    """Raise a UsageError if a file of ``shards`` is missing, as after an interrupted download."""
    missing = [name for name in shards if name not in present]
    if missing:
        problem = f"{len(missing)} of its {len(shards)} shards are not in {folder}: {', '.join(missing[:3])}"
        raise UsageError(where, problem, "finish the download (`hf download`)")


def _list_files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise UsageError(f"model {folder}", f"cannot be read ({error.strerror})", "check its permissions") from None


def shard_names(index: dict[str, Any], where: str) -> list[str]:
    """Return the names of the files that an index lists. Each must be a plain name in the same folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(
            f"{where} key 'weight_map'", f"is {short_repr(weight_map)}, not a map of tensors to files", DOWNLOAD_AGAIN
        )
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\0" in name:
            raise UsageError(
                f"{where} key 'weight_map'",
                f"names {short_repr(name)}, which is not the name of a safetensors file in the same folder",
                DOWNLOAD_AGAIN,
            )
        names.add(name)
    return sorted(names)


def read_headers(paths: Iterable[Path]) -> tuple[Tensor, ...]:
    """Return every tensor of these files, without reading weights.

    Raises:
        UsageError: a file is not valid safetensors, or two files hold the same tensor.
    """
    tensor_files: dict[str, tuple[Tensor, Path]] = {}
    for path in paths:
        for tensor in read_header(path):
            if tensor.name in tensor_files:
                first = tensor_files[tensor.name][1].name
                raise UsageError(
                    str(path), f"tensor {short_repr(tensor.name)} is also in {first}", "keep one set of weights"
                )
            tensor_files[tensor.name] = tensor, path
    return tuple(tensor for tensor, _ in tensor_files.values())


def read_header(path: Path) -> tuple[Tensor, ...]:
    """Return the tensors of one file, read from its header."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start == b"version ":
                remedy = "run `git lfs pull` in the model's folder"
                raise UsageError(str(path), "is a Git LFS pointer, not the weights", remedy)
            if len(start) < 8:  # noqa: PLR2004 - the header's length is a little-endian u64
                raise UsageError(str(path), f"is cut off: it has {size} bytes", DOWNLOAD_AGAIN)
            length = int.from_bytes(start, "little")
            if length > min(HEADER_LIMIT, size - 8):
                raise UsageError(
                    str(path), f"declares a header of {length} bytes, but the file has {size}", DOWNLOAD_AGAIN
                )
            header = file.read(length)
    except OSError as error:
        raise UsageError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from None
    return parse_header(header, str(path), size - 8 - length)


def parse_header(header: bytes, where: str, data_bytes: int) -> tuple[Tensor, ...]:
    """Return the tensors that a header describes. They must fill ``data_bytes`` exactly, as safetensors requires."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise UsageError(where, "its header names a tensor or a field twice", DOWNLOAD_AGAIN)
        return value

    try:
        entries = json.loads(header.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError):
        raise UsageError(where, "its header is not JSON in UTF-8", DOWNLOAD_AGAIN) from None
    if not isinstance(entries, dict):
        raise UsageError(where, "its header is not an object", DOWNLOAD_AGAIN)
    entries.pop("__metadata__", None)
    tensors, spans = [], []
    for name, entry in entries.items():
        tensor, span = _parse_entry(name, entry, where)
        tensors.append(tensor)
        spans.append((*span, name))
    expected_begin = 0
    for begin, end, name in sorted(spans):
        if begin != expected_begin:
            problem = "overlaps another tensor" if begin < expected_begin else "leaves a gap before it"
            raise UsageError(where, f"tensor {short_repr(name)} {problem} at byte {begin}", DOWNLOAD_AGAIN)
        expected_begin = end
    if expected_begin != data_bytes:
        problem = f"its tensors take {expected_begin} bytes, but the file holds {data_bytes}"
        raise UsageError(where, problem, DOWNLOAD_AGAIN)
    return tuple(tensors)


def _parse_entry(name: str, entry: Any, where: str) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict):
        raise UsageError(where, f"tensor {short_repr(name)} is {short_repr(entry)}, not an object", DOWNLOAD_AGAIN)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in STORED_BITS:
        raise UsageError(where, f"tensor {short_repr(name)} has the unknown dtype {short_repr(dtype)}", DOWNLOAD_AGAIN)
    if not _is_size_list(shape):
        raise UsageError(where, f"tensor {short_repr(name)} has the shape {short_repr(shape)}", DOWNLOAD_AGAIN)
    if not _is_size_list(offsets) or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        raise UsageError(where, f"tensor {short_repr(name)} has the offsets {short_repr(offsets)}", DOWNLOAD_AGAIN)
    bits = STORED_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > 2**80:
            break
    if offsets[1] - offsets[0] != (bits + 7) // 8:
        size = offsets[1] - offsets[0]
        problem = (
            f"tensor {short_repr(name)} of {dtype} {short_repr(shape)} has {size} bytes, which does not match its shape"
        )
        raise UsageError(where, problem, DOWNLOAD_AGAIN)
    return Tensor(name, dtype, tuple(shape)), (offsets[0], offsets[1])


def _is_size_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
