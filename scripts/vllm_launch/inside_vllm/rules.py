"""The rules of the guard: the launcher writes them into a file, and the guard inside vLLM reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE_VARIABLE = "LAUNCH_GUARD_FILE"
"""The environment variable that holds the path of the file."""


class RulesError(Exception):
    """The rules cannot be read. The message never contains text of the file, because the file holds keys."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings of the guard, as JSON in the file that ``FILE_VARIABLE`` names.

    ``keys``: accepted API keys. If empty, no key is needed.
    ``routes``: a route is allowed if it is one of these or lies below one. If empty, every route is allowed.
    ``probe_key``: the launcher's own key. It opens every route, so that hang detection does not depend on ``routes``.
    ``drain_flag``, ``refuse_flag``: paths of flag files. ``retry_after``: seconds.
    ``allowed_origins`` and the three below it: vLLM's options for CORS, with vLLM's defaults.
    """

    keys: Sequence[str] = ()
    probe_key: str | None = None
    routes: Sequence[str] = ()
    drain_flag: str | None = None
    refuse_flag: str | None = None
    retry_after: int = 5
    allowed_origins: Sequence[str] = ()
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False

    def as_json(self) -> str:
        """Return the rules as JSON, the text of their file."""
        return json.dumps(dataclasses.asdict(self))


LISTS = ("keys", "routes", "allowed_origins", "allowed_methods", "allowed_headers")
TEXTS = ("probe_key", "drain_flag", "refuse_flag")


def read_rules(path: str | None) -> Rules:
    """Return the rules in the file ``path``.

    Raises:
        RulesError: there is no file, or it does not hold what ``Rules.as_json`` writes. A field of the wrong type could
            let every request in, so nothing is guessed.
    """
    if not path:
        raise RulesError(f"the variable {FILE_VARIABLE} is not set")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RulesError(f"{path} ({FILE_VARIABLE}) cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        values = None
    if not _is_complete(values):
        raise RulesError(f"{path} ({FILE_VARIABLE}) does not hold rules as vllm-launch writes them")
    return Rules(**values)


def _is_complete(values: Any) -> bool:
    """Return whether ``values`` has keys (an empty list is a decision, a missing one is not) and no wrong type."""
    if not isinstance(values, dict) or not isinstance(values.get("keys"), list):
        return False
    known = {field.name for field in dataclasses.fields(Rules)}
    return (
        values.keys() <= known
        and all(_is_list_of_text(values[name]) for name in LISTS if name in values)
        and all(values[name] is None or isinstance(values[name], str) for name in TEXTS if name in values)
        and type(values.get("retry_after", 0)) is int
        and type(values.get("allow_credentials", False)) is bool
        and all(values["keys"])
        and all(route.startswith("/") for route in values.get("routes", ()))
    )


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
