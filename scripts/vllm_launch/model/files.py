"""Reads one small file of a model: JSON, a Jinja template, or a tokenizer without its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vllm_launch.errors import UsageError
from vllm_launch.model.config import parse_json

JSON_LIMIT = 256 * 2**20
"""Upper limit of a config or an index, in bytes. The largest known index has a tenth of it."""

DOWNLOAD_AGAIN = "download the file again (`hf download`)"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return parse_json(_read_bytes(path, JSON_LIMIT), str(path))


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from None
    if len(data) > limit:
        raise UsageError(str(path), f"is larger than {limit} bytes", DOWNLOAD_AGAIN)
    return data


def read_small(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``. The list in sentence-transformers' modules.json becomes ``{"modules": …}``.

    The text of a Jinja template becomes ``{"text": …}``.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    if path.suffix == ".jinja":
        return read_template(path)
    return (
        parse_json(b'{"modules": %b}' % path.read_bytes(), str(path))
        if path.name == "modules.json"
        else read_json(path)
    )


def read_template(path: Path) -> dict[str, Any]:
    """Return the text of a Jinja template as ``{"text": …}``."""
    try:
        return {"text": _read_bytes(path, JSON_LIMIT).decode()}
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"is not UTF-8 ({error.reason} at byte {error.start})", DOWNLOAD_AGAIN) from None


class _Tokenizer(msgspec.Struct):
    added_tokens: list[dict[str, Any]] = []


def read_tokenizer(path: Path) -> dict[str, Any]:
    """Return ``{"added_tokens": […]}`` of a tokenizer.json, without its vocabulary of up to 30 MB.

    Raises:
        UsageError: the file cannot be read, or is not JSON of this form.
    """
    try:
        return {"added_tokens": msgspec.json.decode(_read_bytes(path, JSON_LIMIT), type=_Tokenizer).added_tokens}
    except msgspec.DecodeError as error:
        raise UsageError(str(path), f"is not a tokenizer's JSON ({str(error)[:120]})", DOWNLOAD_AGAIN) from None
