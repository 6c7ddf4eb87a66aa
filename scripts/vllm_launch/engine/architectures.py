"""Model architectures that the pinned vLLM can run. architectures.json is generated from vLLM's own registry."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from vllm_launch.errors import UsageError


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """One model architecture and what vLLM can do with it. generators/architectures.py defines the ``flags``.

    ``registered`` is the name of the class in vLLM's registry. It differs from ``name`` if vLLM converts the model.
    """

    name: str
    registered: str
    flags: tuple[str, ...]
    task: Literal["generate", "pooling"]
    native: bool  # False: vLLM runs it through the Transformers backend


@cache
def _table() -> dict[str, Any]:
    document: dict[str, Any] = msgspec.json.decode(Path(__file__).with_name("architectures.json").read_bytes())
    return document


def config_defaults(model_type: str) -> dict[str, Any]:
    """Return the values that transformers' config class for ``model_type`` fills in, or {} for an unknown type."""
    values: dict[str, Any] = _table()["defaults"].get(model_type, {})
    return values


def is_known_type(model_type: str) -> bool:
    """Whether vLLM or its transformers has a config class for ``model_type``."""
    return model_type in _table()["defaults"]


def tasks_of(architecture: str) -> tuple[str, ...]:
    """Return what vLLM's class for ``architecture`` can do: "generate", "pooling", both, or () if it has no class."""
    flags = _table()["architectures"].get(architecture, ())
    return tuple(flag for flag in flags if flag in {"generate", "pooling"})


def is_multimodal(architecture: str) -> bool:
    """Whether vLLM has an implementation of ``architecture`` that takes images, videos or audio."""
    return "multimodal" in _table()["architectures"].get(architecture, ())


def only_transcribes(architecture: str) -> bool:
    """Whether vLLM's class for ``architecture`` serves only transcriptions, and no text-only requests."""
    return "transcription_only" in _table()["architectures"].get(architecture, ())


def resolve(architectures: Sequence[str], where: str, *, custom_code: bool) -> tuple[Architecture, tuple[str, ...]]:
    """Return the first of ``architectures`` that vLLM runs, and warnings.

    ``custom_code``: whether config.json has an ``auto_map`` with a model. The Transformers backend can then run the
    code in the model's repository, unless vLLM has dropped the architecture.
    Source: vllm/model_executor/models/registry.py:inspect_model_cls, _normalize_arch.

    Raises:
        UsageError: vLLM runs none of them. The text names the last release that did, or the closest known names.
    """
    known = _table()
    if not architectures:
        raise UsageError(
            f"{where} key 'architectures'", "is missing, so vLLM cannot tell which model this is", "add it"
        )
    for name in architectures:
        if name in known["architectures"]:
            flags = tuple(known["architectures"][name])
            return Architecture(name=name, registered=name, flags=flags, task=_task(name, flags), native=True), ()
        for suffix, (task, convert) in known["suffixes"]:
            if not name.endswith(suffix) or convert == "none":
                continue
            for other, _ in known["suffixes"]:  # vLLM converts a base model into a pooling model
                base = name.removesuffix(suffix) + other
                if base in known["architectures"]:
                    flags = tuple(known["architectures"][base])
                    return Architecture(name=name, registered=base, flags=flags, task=task, native=True), ()
    name = architectures[0]
    if name not in known["transformers_backend"]:
        _refuse_dropped(architectures, where)
    if name in known["transformers_backend"] or custom_code:
        code = "the code in the model's repository (needs --trust-remote-code)" if custom_code else "transformers' code"
        warning = (
            f"vLLM {known['vllm']} has no implementation of {name}. It runs {code} through the Transformers backend, "
            "which is slower"
        )
        task = _task(name, ("generate",))
        return Architecture(name=name, registered=name, flags=("generate",), task=task, native=False), (warning,)
    near = difflib.get_close_matches(name, known["architectures"], n=3)
    hint = f"nearest known: {', '.join(near)}" if near else "see the list of supported models in vLLM's documentation"
    raise UsageError(f"{where} architecture {name[:80]!r}", f"vLLM {known['vllm']} does not know it", hint)


def _refuse_dropped(architectures: Sequence[str], where: str) -> None:
    """Raise the error for architectures that vLLM has dropped or runs only with a plugin. Else do nothing.

    Code in the model's repository does not help: it was written for the releases that had the architecture, and the
    Transformers backend refuses it. Source: vllm/model_executor/models/registry.py:_raise_for_unsupported.
    """
    known = _table()
    for name in architectures:
        if name in known["removed"]:
            problem = f"vLLM {known['vllm']} no longer runs it: {known['removed'][name]} was the last release that did"
            raise UsageError(f"{where} architecture {name}", problem, "use another model, or that release of vLLM")
        if name in known["plugins"]:
            problem = f"vLLM {known['vllm']} runs it only with a plugin"
            raise UsageError(f"{where} architecture {name}", problem, f"install {known['plugins'][name]}")


def _task(name: str, flags: Sequence[str]) -> Literal["generate", "pooling"]:
    """Return the task as vLLM chooses it: pooling if the class can pool, or else what the suffix of the name says.

    Source: vllm/config/model.py:_get_default_runner_type.
    """
    if name in _table()["architectures"] and {"pooling", "generate"} & set(flags):
        return "pooling" if "pooling" in flags else "generate"
    for suffix, (task, _) in _table()["suffixes"]:
        if name.endswith(suffix):
            return "pooling" if task == "pooling" else "generate"
    return "generate" if "generate" in flags else "pooling"
