"""Reads the API keys that clients may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_health.api_keys import is_usable, keys_in
from vllm_launch.errors import UsageError
from vllm_launch.settings.settings import Settings


def read_api_keys(
    settings: Settings, environ: Mapping[str, str], *, read_file: Callable[[Path], str] | None = None
) -> tuple[str, ...]:
    """Return the keys that clients may use. Empty: clients need no key.

    The keys come from api_key_file and from --api-key. Without --api-key they come from VLLM_API_KEY
    (vllm/entrypoints/serve/middleware/register.py has the same order).

    Raises:
        UsageError: the file cannot be read or has no usable key. A mistake must not make the server run without keys.
    """
    # A variable from a Kubernetes Secret often ends with a line end, which no client can send.
    option = settings.engine.get("api_key") or [environ.get("VLLM_API_KEY", "").strip()]
    assert isinstance(option, list)  # noqa: S101 - nargs "+"
    keys = _usable([str(key) for key in option if key], settings.origin.get("api_key", "environment VLLM_API_KEY"))
    if (path := settings.launch.api_key_file) is not None:
        where = f"{settings.origin.get('launch.api_key_file', 'api_key_file')} ({path})"
        from vllm_launch.settings import config_file  # noqa: PLC0415 - PyYAML, as in read.py

        text = config_file.text_of(path, where, "give a UTF-8 file with one key per line", read_file)
        in_file = keys_in(text)
        if not in_file:
            raise UsageError(where, "the file holds no key", "write one key per line")
        keys += _usable(in_file, where)
    return tuple(dict.fromkeys(keys))


def _usable(keys: list[str], where: str) -> list[str]:
    if not all(map(is_usable, keys)):
        problem = "an API key contains a space or a non-ASCII character, which HTTP headers cannot carry"
        raise UsageError(where, problem, "make another key, for example with `openssl rand -hex 32`")
    return keys
