"""Reads a model's small files from the Hugging Face hub or from its cache on this disk; downloads all of it."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

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
from vllm_launch.model.checkpoint import SMALL_FILES, Checkpoint, read_headers, read_json, shard_names
from vllm_launch.model.config import shown
from vllm_launch.model.dtypes import STORED_BITS
from vllm_launch.model.model import Tensor


def read_hub(name: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """The checkpoint of the hub id ``name``: config, index and headers alone, a few megabytes at most.

    ``token`` None means huggingface_hub's own: HF_TOKEN or the one that `hf auth login` stored.
    """
    if "HF_HUB_VERBOSITY" not in os.environ:  # else it tells of each of its tries, and we of what came of them
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision, token=token))
        files = {"config.json": read_json(config)}
        for small in SMALL_FILES:
            try:
                files[small] = read_json(Path(hf_hub_download(name, small, revision=revision, token=token)))
            except EntryNotFoundError:  # LocalEntryNotFoundError too: offline, and never downloaded
                continue
        tensors = _cached(name, config.parent)
        if tensors is None and not constants.HF_HUB_OFFLINE:
            tensors = _remote(name, revision, token)
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises becomes one line
        _explain(error, name, revision)
    warnings = []
    if tensors is None:
        warnings.append(f"{name}: no safetensors were found, so sizes of tensors follow from config.json")
    return Checkpoint(None, files, tensors, warnings)


NOT_SERVED = ("original/*", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
"""The same weights in other forms, which vLLM passes over (model_executor/model_loader/default_loader.py)."""

LEFT_BEHIND_S = 900.0
"""A partial download that nobody has written to for this many seconds is abandoned."""


def download(name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Everything that vLLM reads of ``name``, into the hub's cache, but for files that an earlier try has whole.

    Returns the snapshot's folder, and leaves word of it for ``downloaded``. Parts of files that a killed try left are
    removed, since the hub's client makes new ones (huggingface_hub/file_download.py:_download_to_tmp_and_move).

    Raises:
        UsageError: the hub or the disk does not let us.
    """
    try:
        _clear(Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "blobs"))
        files = HfApi(token=token).list_repo_files(name, revision=revision)
        pickled = ("*.bin", "*.pt") if any(file.endswith(".safetensors") for file in files) else ()
        ignored = [*NOT_SERVED, *pickled]
        folder = snapshot_download(name, revision=revision, token=token, ignore_patterns=ignored, max_workers=4)
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises becomes one line
        _explain(error, name, revision)
    word = _word_of(name, revision)
    word.parent.mkdir(parents=True, exist_ok=True)
    word.write_text(f"{folder}\n")
    return Path(folder)


def _clear(blobs: Path) -> None:
    parts = list(blobs.glob("*.incomplete"))
    if parts:
        with tempfile.TemporaryFile(dir=blobs) as probe:  # the disk's own time, which may be another machine's
            now = os.fstat(probe.fileno()).st_mtime
        for part in parts:
            if now - part.stat().st_mtime > LEFT_BEHIND_S:
                part.unlink(missing_ok=True)


def downloaded(name: str, revision: str | None = None) -> bool:
    """Whether ``download`` has come to its end here, by whichever process."""
    return _word_of(name, revision).is_file()


def _word_of(name: str, revision: str | None) -> Path:
    return Path(constants.HF_HOME, "downloaded", f"{name.replace('/', '--')}@{(revision or 'main').replace('/', '--')}")


def cached_files(name: str, revision: str | None = None) -> list[Path]:
    """The shards that the cache has of the hub id ``name``; none unless all are there."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return _files(name, Path(config).parent) if isinstance(config, str) else []


def _files(name: str, snapshot: Path) -> list[Path]:
    index = snapshot / "model.safetensors.index.json"
    shards = shard_names(read_json(index), str(index)) if index.is_file() else ["model.safetensors"]
    paths = [try_to_load_from_cache(name, shard, revision=snapshot.name) for shard in shards]
    return [Path(str(path)) for path in paths] if all(isinstance(path, str) for path in paths) else []


def _cached(name: str, snapshot: Path) -> tuple[Tensor, ...] | None:
    """Headers of the shards in the cache's ``snapshot``; None unless all are there."""
    paths = _files(name, snapshot)
    return read_headers(paths) if paths else None


def _remote(name: str, revision: str | None, token: str | None) -> tuple[Tensor, ...] | None:
    """Headers by HTTP range requests."""
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
            what = f"tensor {shown(tensor.name)} has the unknown dtype {shown(tensor.dtype)}"
            raise UsageError(f"model {name}", what, "choose another revision")
    return tuple(tensors)


FOLDER = "or give a folder that holds the model"


def _explain(error: Exception, name: str, revision: str | None) -> NoReturn:
    """Raise what went wrong at the hub as one line with a remedy; the order is from the narrow to the wide.

    Transport errors are told by their module: releases of huggingface_hub differ in the HTTP library they use.
    """
    page = f"https://huggingface.co/{name}"
    at = f" at revision {revision!r}" if revision else ""
    rules: list[tuple[type[Exception], str, str]] = [
        (GatedRepoError, "is gated", f"accept its licence at {page} and set HF_TOKEN, {FOLDER}"),
        (
            RepositoryNotFoundError,
            "there is no such model on the hub, or it is private, and no such folder here",
            "check the spelling, and set HF_TOKEN if it is private",
        ),
        (RevisionNotFoundError, f"has no revision {revision!r}", f"choose one of those at {page}/tree/main"),
        (
            OfflineModeIsEnabled,
            f"is not in the hub's cache{at} and HF_HUB_OFFLINE is set",
            f"run `hf download {name}` once with the network, {FOLDER}",
        ),
        (
            LocalEntryNotFoundError,
            f"is not in the hub's cache{at} and the hub cannot be reached",
            f"check the network and HF_ENDPOINT, run `hf download {name}` where there is one, {FOLDER}",
        ),
        (EntryNotFoundError, f"has no config.json{at}", "take a model in the Hugging Face format"),
        (
            HFValidationError,
            "is neither a folder nor a hub id",
            "give a folder that exists, or an id such as Qwen/Qwen3-8B",
        ),
        (UnicodeEncodeError, "the hub's token is not plain ASCII", "check HF_TOKEN, or run `hf auth login` again"),
        (SafetensorsParsingError, f"its safetensors headers on the hub are broken{at}", "choose another revision"),
        (HfHubHTTPError, *_refused(error)),
        (OSError, f"the hub cannot be reached ({type(error).__name__})", f"check the network, {FOLDER}"),
    ]
    if isinstance(error, UsageError):
        raise error
    if isinstance(error.__cause__, OfflineModeIsEnabled):  # why the client found nothing, which it does not say itself
        error = error.__cause__
    if isinstance(error, OSError) and (error.filename or error.errno in {errno.ENOSPC, errno.EDQUOT}):
        what = f"the hub's cache in {constants.HF_HUB_CACHE} cannot be used ({error.strerror})"
        raise UsageError(f"model {name}", what, f"set HF_HOME to a folder that this user may write, {FOLDER}") from None
    transport = type(error).__module__.partition(".")[0] in {"httpx", "httpx2"}
    for kind, what, remedy in rules:
        if isinstance(error, kind) or (transport and kind is OSError):
            raise UsageError(f"model {name}", what, remedy) from None
    raise error


def _refused(error: Exception) -> tuple[str, str]:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == HTTPStatus.UNAUTHORIZED:
        return "the hub does not know the token (HTTP 401)", f"set HF_TOKEN to one that is valid, {FOLDER}"
    how = type(error).__name__ if status is None else f"HTTP {status}"
    return f"the hub refused ({how})", f"try again later, set HF_TOKEN, {FOLDER}"
