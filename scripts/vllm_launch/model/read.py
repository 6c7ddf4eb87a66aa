"""Finds a model in a folder or on the hub and reads its description, without torch or transformers."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_launch.errors import UsageError
from vllm_launch.model.build import build
from vllm_launch.model.chat import UserChat
from vllm_launch.model.checkpoint import Checkpoint, read_folder, shards
from vllm_launch.model.files import read_template
from vllm_launch.model.model import Model
from vllm_launch.model.names import refuse_address, refuse_modelscope


def read_model(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    runner: str | None = None,
    convert: str | None = None,
    pooler_config: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> Model:
    """Return the model of the folder or hub id ``name``, without reading weights.

    ``revision`` and ``token`` are for the hub. Token None means HF_TOKEN or the stored login. ``hf_overrides``,
    ``runner``, ``convert``, ``pooler_config`` and ``chat_template`` are the values of vLLM's options,
    ``chat_template_kwargs`` that of --default-chat-template-kwargs, ``processor_options`` that of
    --mm-processor-kwargs. In the result, ``tensors_from`` is "safetensors" if tensor sizes come from safetensors
    headers, and "config" if they are derived from config.json.

    Raises:
        UsageError: the model does not exist, cannot be read, has broken files, or vLLM does not run it.
    """
    return build(
        name,
        open_checkpoint(name, revision=revision, token=token),
        hf_overrides or {},
        runner=runner,
        convert=convert,
        pooler_config=pooler_config,
        user_chat=UserChat(
            template=None if chat_template is None else _template_source(chat_template),
            variables=chat_template_kwargs or {},
        ),
        processor_options=processor_options,
    )


def _template_source(option: str) -> str:
    """Return the Jinja source of --chat-template, or "" if no file here has it (renderers/chat_utils.py)."""
    if any(sign in option for sign in "{}\n"):
        return option
    path = Path(option)
    return read_template(path)["text"] if path.is_file() else ""


def open_checkpoint(name: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Return the checkpoint of the folder or hub id ``name``. ``revision`` and ``token`` are for the hub only.

    Raises:
        UsageError: the model does not exist, cannot be read, or has broken files.
    """
    if not name or "\0" in name:
        raise UsageError(f"model {name!r}", "is not a name", "give a folder or a hub id such as Qwen/Qwen3-8B")
    folder = Path(name)
    try:
        mode = folder.stat().st_mode
        if stat.S_ISDIR(mode):
            return read_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:  # a parent folder without permission, or a name that is too long
        remedy = "check the name, and the permissions of its parent folders"
        raise UsageError(f"model {name}", f"cannot be read ({error.strerror})", remedy) from None
    refuse_address(name)
    if mode:
        raise UsageError(f"model {name}", "is a file", "give the folder that holds config.json and *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"model {name}", "there is no such folder", "give a folder that exists, or a hub id")
    refuse_modelscope(name, os.environ)
    from vllm_launch.model.hub import read_hub  # noqa: PLC0415 - slow to import, and folders do not need it

    return read_hub(name, revision=revision, token=token)


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """Return the safetensors files of a checkpoint that ``open_checkpoint`` has read, or [] if any is not local."""
    if (folder := Path(name)).is_dir():
        return [folder / shard for shard in shards(folder)]
    from vllm_launch.model.hub import cached_files  # noqa: PLC0415 - as above

    return cached_files(name, revision)
