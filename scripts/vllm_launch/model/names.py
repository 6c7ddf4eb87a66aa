"""Refuses model names that the planner cannot read, each with one line that says what to give instead. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from vllm_launch.engine.options import pinned_vllm
from vllm_launch.engine.removed import REMOVED_METHODS
from vllm_launch.errors import UsageError

OBJECT_STORAGE = ("s3", "gs", "az")
"""Schemes that vLLM reads with the Run:ai Model Streamer (vllm/transformers_utils/runai_utils.py:is_runai_obj_uri)."""

HUB_HOSTS = ("huggingface.co", "hf.co", "hf-mirror.com")
MODELSCOPE_HOSTS = ("modelscope.cn", "modelscope.ai")

EXAMPLE = "Qwen/Qwen3-8B"

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://+(.*)", re.IGNORECASE | re.DOTALL)
_GGUF = re.compile(r"\.gguf$|:(UD-)?(I?Q\d+_\w+|TQ\d_\w+|BF16|F16|F32|MXFP4\w*)$", re.IGNORECASE)
"""A GGUF file, or "repository:quantisation" as llama.cpp and vLLM's plugin for GGUF write it."""


def refuse_address(name: str) -> None:
    """Refuse a ``name`` that is an address or GGUF. Do nothing for a folder and for an id of the hub.

    Raises:
        UsageError: vLLM does not load such a name, or the plan cannot read it.
    """
    if _GGUF.search(name):
        raise gguf(name)
    without_scheme = name.partition("/")[0].lower() in {*HUB_HOSTS, *MODELSCOPE_HOSTS}
    if (address := _ADDRESS.fullmatch(f"https://{name}" if without_scheme else name)) is None:
        return
    scheme, rest = address[1].lower(), address[2]
    if scheme in OBJECT_STORAGE:
        problem = "is in object storage. vLLM can stream it, but the plan reads only a local folder or the hub"
        remedy = "copy the model into a folder and give the folder (its JSON files are enough for vllm-launch plan)"
        raise UsageError(f"model {name}", problem, remedy)
    host, _, path = rest.partition("/") if scheme in {"http", "https"} else (scheme, "", rest)
    host = host.lower().removeprefix("www.")
    if host in {"modelscope", "ms", *MODELSCOPE_HOSTS}:
        raise _on_modelscope(name, _model_id(path.removeprefix("models/")))
    if host in {"hf", "huggingface", *HUB_HOSTS}:
        raise UsageError(
            f"model {name}", "is an address, not a name", f"give the hub id alone: {_model_id(path) or EXAMPLE}"
        )
    if scheme == "file":
        raise UsageError(f"model {name}", "is an address, not a path", f"give the path alone: /{rest.lstrip('/')}")
    problem = f"is an address that vLLM {pinned_vllm()} does not load"
    raise UsageError(f"model {name}", problem, f"give a folder that holds the model, or a hub id such as {EXAMPLE}")


def refuse_modelscope(name: str, environ: Mapping[str, str]) -> None:
    """Refuse ``name``, which is not a folder, if vLLM would load it from ModelScope (vllm/envs.py).

    Raises:
        UsageError: VLLM_USE_MODELSCOPE is set.
    """
    if environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in {"1", "true"}:
        raise _on_modelscope(name, name)


def gguf(name: str) -> UsageError:
    """Return the error for a GGUF model."""
    problem = (
        f"is a GGUF model. vLLM {pinned_vllm()} reads it only with vllm-gguf-plugin, and the launcher cannot plan it"
    )
    return UsageError(f"model {name}", problem, REMOVED_METHODS["gguf"])


def _on_modelscope(name: str, model_id: str) -> UsageError:
    problem = "is on ModelScope (VLLM_USE_MODELSCOPE), which vLLM can read, but the plan cannot"
    command = f"modelscope download --model {model_id or EXAMPLE} --local_dir FOLDER"
    return UsageError(f"model {name}", problem, f"run `{command}` and give the folder")


def _model_id(path: str) -> str:
    """Return the first two parts of ``path``, without a revision: "Qwen/Qwen3-8B", or "" for an empty path."""
    return "/".join(PurePosixPath(path.partition("?")[0].partition("@")[0]).parts[:2])
