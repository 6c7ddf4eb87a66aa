"""Reads a model's small files from the Hugging Face hub or its local cache, and downloads whole models."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from vllm_launch.errors import UsageError
from vllm_launch.model.checkpoint import TOKENIZER, Checkpoint, read_headers, shard_names, small_files
from vllm_launch.model.config import short_repr
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.files import read_json, read_small, read_tokenizer
from vllm_launch.model.model import Tensor
from vllm_launch.model.names import gguf
from vllm_launch.model.pooling import pooling_file


def read_hub(name: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Return the checkpoint of the hub id ``name``. Reads only config, index, headers and files of the tokenizer.

    These are a few megabytes, or up to 30 MB if only tokenizer.json lists the tokenizer's added tokens.
    ``token`` None means huggingface_hub's own token: HF_TOKEN, or the one that `hf auth login` stored.
    """
    if "HF_HUB_VERBOSITY" not in os.environ:  # hide its line for each retry: our error is enough
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, token=token))
        files = {"config.json": read_json(config)}
        for small in small_files(files["config.json"]):
            if (path := _optional(name, small, revision, token)) is not None:
                files[small] = read_small(path)
        if (pooling := pooling_file(files)) and (path := _optional(name, pooling, revision, token)) is not None:
            files[pooling] = read_small(path)
        if "added_tokens_decoder" not in files.get("tokenizer_config.json", {}) and (
            (path := _optional(name, TOKENIZER, revision, token)) is not None
        ):
            files[TOKENIZER] = read_tokenizer(path)
        names = _file_names(name, revision, token, files["config.json"], config.parent)
        tensors = _cached_tensors(name, config.parent)
        if tensors is None and not constants.HF_HUB_OFFLINE:
            tensors = _remote_tensors(name, revision, token)
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises becomes one line
        _raise_usage_error(error, name, revision)
    warnings = []
    if tensors is None:
        warnings.append(f"{name}: no safetensors files were found, so tensor sizes are derived from config.json")
    return Checkpoint(None, files, tensors, warnings, names)


def _optional(name: str, file: str, revision: str | None, token: str | None) -> Path | None:
    """Return the path of a file of the repository, or None if it has none."""
    try:
        return Path(hf_hub_download(name, file, revision=revision, token=token))
    except EntryNotFoundError:  # also LocalEntryNotFoundError: offline and not in the cache
        return None


def _file_names(
    name: str, revision: str | None, token: str | None, config: dict[str, Any], snapshot: Path
) -> list[str]:
    """Return the names of the repository's files. The hub is asked only if they matter: for Mistral's tokenizer."""
    if constants.HF_HUB_OFFLINE or "istral" not in str(config.get("architectures")):
        return [path.name for path in snapshot.iterdir()]
    return HfApi(token=token).list_repo_files(name, revision=revision)


OTHER_FORMATS = ("original/*", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
"""Patterns of weights in formats that vLLM ignores (model_executor/model_loader/default_loader.py)."""

ABANDONED_AFTER_S = 900.0
"""A partial download that nobody has written to for this many seconds is abandoned."""


def download(name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download all files of ``name`` that vLLM reads into the hub's cache, and return the snapshot's folder.

    Files that the cache already has are not downloaded again. Writes a marker for ``downloaded``. First removes
    abandoned partial files: the hub's client does not resume them
    (huggingface_hub/file_download.py:_download_to_tmp_and_move).

    Raises:
        UsageError: the hub refuses, or the disk is full or not writable.
    """
    try:
        _remove_abandoned(Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "blobs"))
        files = HfApi(token=token).list_repo_files(name, revision=revision)
        pickled = ("*.bin", "*.pt") if any(file.endswith(".safetensors") for file in files) else ()
        ignored = [*OTHER_FORMATS, *pickled]
        snapshot = snapshot_download(name, revision=revision, token=token, ignore_patterns=ignored, max_workers=4)
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises becomes one line
        _raise_usage_error(error, name, revision)
    marker = _marker(name, revision)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{snapshot}\n")
    return Path(snapshot)


def _remove_abandoned(blobs: Path) -> None:
    partial_files = list(blobs.glob("*.incomplete"))
    if partial_files:
        with tempfile.TemporaryFile(dir=blobs) as probe:  # the file system's clock, which may be another machine's
            now = os.fstat(probe.fileno()).st_mtime
        for partial_file in partial_files:
            if now - partial_file.stat().st_mtime > ABANDONED_AFTER_S:
                partial_file.unlink(missing_ok=True)


def downloaded(name: str, revision: str | None = None) -> bool:
    """Whether ``download`` has finished on this machine, in any process."""
    return _marker(name, revision).is_file()


def _marker(name: str, revision: str | None) -> Path:
    return Path(constants.HF_HOME, "downloaded", f"{name.replace('/', '--')}@{(revision or 'main').replace('/', '--')}")


def cached_files(name: str, revision: str | None = None) -> list[Path]:
    """Return the cached shards of the hub id ``name``, or [] if any is missing."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return _cached_shards(name, Path(config).parent) if isinstance(config, str) else []


def _cached_shards(name: str, snapshot: Path) -> list[Path]:
    index = snapshot / "model.safetensors.index.json"
    shards = shard_names(read_json(index), str(index)) if index.is_file() else ["model.safetensors"]
    paths = [try_to_load_from_cache(name, shard, revision=snapshot.name) for shard in shards]
    return [Path(str(path)) for path in paths] if all(isinstance(path, str) for path in paths) else []


def _cached_tensors(name: str, snapshot: Path) -> tuple[Tensor, ...] | None:
    """Return the tensors of the shards in the cached ``snapshot``, or None if any shard is missing."""
    paths = _cached_shards(name, snapshot)
    return read_headers(paths) if paths else None


def _remote_tensors(name: str, revision: str | None, token: str | None) -> tuple[Tensor, ...] | None:
    """Return the tensors of a repository, or None if it has no safetensors. Reads headers by HTTP range requests."""
    try:
        metadata = HfApi(token=token).get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        return None
    tensors = [
        Tensor(tensor, info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    ]
    for tensor in tensors:
        if tensor.dtype not in STORED_BITS:
            problem = f"tensor {short_repr(tensor.name)} has the unknown dtype {short_repr(tensor.dtype)}"
            raise UsageError(f"model {name}", problem, "choose another revision")
    return tuple(tensors)


OR_FOLDER = "or give a folder that holds the model"


def _raise_usage_error(error: Exception, name: str, revision: str | None) -> NoReturn:
    """Raise ``error`` of the hub's client as a UsageError. The rules go from specific to general errors.

    Transport errors are recognised by their module: releases of huggingface_hub use different HTTP libraries.
    """
    page = f"https://huggingface.co/{name}"
    at_revision = f" at revision {revision!r}" if revision else ""
    rules: list[tuple[type[Exception], str, str]] = [
        (GatedRepoError, "is gated", f"accept its licence at {page} and set HF_TOKEN, {OR_FOLDER}"),
        (
            RepositoryNotFoundError,
            "there is no such model on the hub (or it is private), and no such folder on this machine",
            "check the spelling, and set HF_TOKEN if the model is private",
        ),
        (RevisionNotFoundError, f"has no revision {revision!r}", f"choose one of those at {page}/tree/main"),
        (
            OfflineModeIsEnabled,
            f"is not in the hub's cache{at_revision} and HF_HUB_OFFLINE is set",
            f"run `hf download {name}` once with network access, {OR_FOLDER}",
        ),
        (
            LocalEntryNotFoundError,
            f"is not in the hub's cache{at_revision} and the hub cannot be reached",
            f"check the network and HF_ENDPOINT, run `hf download {name}` where the hub is reachable, {OR_FOLDER}",
        ),
        (EntryNotFoundError, f"has no config.json{at_revision}", "choose a model in the Hugging Face format"),
        (
            HFValidationError,
            "is neither a folder nor a hub id",
            "give a folder that exists, or an id such as Qwen/Qwen3-8B",
        ),
        (UnicodeEncodeError, "the hub's token is not plain ASCII", "check HF_TOKEN, or run `hf auth login` again"),
        (
            SafetensorsParsingError,
            f"its safetensors headers on the hub are broken{at_revision}",
            "choose another revision",
        ),
        (HfHubHTTPError, *_http_problem(error)),
        (OSError, f"the hub cannot be reached ({type(error).__name__})", f"check the network, {OR_FOLDER}"),
    ]
    if isinstance(error, UsageError):
        raise error
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError) and _names_gguf(name):
        raise gguf(name) from None
    if isinstance(error.__cause__, OfflineModeIsEnabled):  # the client hides offline mode as the cause
        error = error.__cause__
    if isinstance(error, OSError) and (error.filename or error.errno in {errno.ENOSPC, errno.EDQUOT}):
        problem = f"the hub's cache in {constants.HF_HUB_CACHE} cannot be used ({error.strerror})"
        raise UsageError(
            f"model {name}", problem, f"set HF_HOME to a folder that this user can write to, {OR_FOLDER}"
        ) from None
    transport = type(error).__module__.partition(".")[0] in {"httpx", "httpx2"}
    for kind, problem, remedy in rules:
        if isinstance(error, kind) or (transport and kind is OSError):
            raise UsageError(f"model {name}", problem, remedy) from None
    raise error


def _names_gguf(name: str) -> bool:
    """Whether the repository ``name`` says that it holds GGUF files: "Qwen/Qwen3-8B-GGUF"."""
    return "gguf" in name.lower().partition("/")[2]


def _http_problem(error: Exception) -> tuple[str, str]:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == HTTPStatus.UNAUTHORIZED:
        return "the hub rejects the token (HTTP 401)", f"set HF_TOKEN to a valid token, {OR_FOLDER}"
    cause = type(error).__name__ if status is None else f"HTTP {status}"
    return f"the hub refused the request ({cause})", f"try again later, set HF_TOKEN, {OR_FOLDER}"
