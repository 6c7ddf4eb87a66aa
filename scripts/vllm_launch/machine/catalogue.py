"""Makes a plan possible for a machine that you do not have: `--hardware H100:8`. ``known_gpus`` has the data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from vllm_launch.engine.requirements import MINIMUM_COMPUTE_CAPABILITY
from vllm_launch.errors import UsageError
from vllm_launch.machine.gpus import Gpu, Hardware, cautions
from vllm_launch.machine.known_gpus import ALIASES, DROPPED, ENTRIES
from vllm_launch.units import GIB

_MAX_GPUS = 64  # upper limit for the GPUs of one machine; a larger number is a typing error

_MAX_NEAR = 4
_NEAR = 0.55
"""Largest number of names that an error suggests, and the least similarity of each."""


def parse_hardware_name(text: str) -> Hardware:
    """Return a machine of idle GPUs for ``NAME`` or ``NAME:COUNT``: "H100:8", "A100-80GB-3g.40gb", "NVIDIA L4:2".

    Case, spaces, dashes and NVIDIA's brand names do not matter. Raises UsageError.
    """
    name, colon, number = text.partition(":")
    if colon and not (re.fullmatch(r"[0-9]{1,9}", number.strip()) and 1 <= int(number) <= _MAX_GPUS):
        raise UsageError(
            f"--hardware {text}",
            f"{number!r} is not a valid number of GPUs in one machine",
            f"give 1 to {_MAX_GPUS}, for example H100:8",
        )
    key = _entry_key(text, name)
    entry, count = ENTRIES[key], int(number) if colon else 1
    memory = round(entry.memory * GIB)
    free = memory if entry.idle is None else round(entry.idle * GIB)
    gpus = tuple(
        Gpu(
            index=place,
            # The format is valid, but all digits except the position are zero, so it cannot be a real GPU's UUID.
            uuid=f"{'MIG' if ' MIG ' in entry.nvml_name else 'GPU'}-00000000-0000-0000-0000-{place:012x}",
            name=entry.nvml_name,
            memory_total=memory,
            memory_free=free,
            compute_capability=entry.compute_capability,
            mig_profile=entry.nvml_name.partition(" MIG ")[2] or None,
            unified=entry.idle is not None,
        )
        for place in range(count)
    )

    def between_all(linked: bool) -> tuple[tuple[bool, ...], ...]:  # noqa: FBT001  the value of every pair
        return tuple(tuple(linked and a != b for b in range(count)) for a in range(count))

    return Hardware(
        gpus=gpus,
        nvlink=between_all(entry.link == "nvlink"),
        p2p=between_all(entry.link != "none"),
        source="catalogue",
        warnings=cautions(gpus),
    )


def _entry_key(text: str, name: str) -> str:
    """Return the key in ``ENTRIES`` that ``name`` stands for. Raises UsageError; ``text`` is the whole argument."""
    known = _spellings()
    wanted = _normalized(name)
    if wanted in known:
        return known[wanted]
    _refuse_dropped(text, name)
    _refuse_times(text, name, known)
    same_model = _same_model(wanted)
    if len(same_model) == 1:
        return same_model[0]
    near = same_model or _same_model(_normalized(_without_variant(name))) or _nearest(name)
    near = near or [key for key in ENTRIES if "g." not in key]
    problem = f"{name.strip()!r} " + ("matches several GPUs" if same_model else "is not in the catalogue")
    raise UsageError(
        f"--hardware {text}", problem, f"use {' or '.join(near)}, or a file from `vllm-launch gpus --format json`"
    )


def _same_model(wanted: str) -> list[str]:
    """Return the keys that are ``wanted`` without their memory size, which distinguishes the two A100s."""
    return [key for key in ENTRIES if wanted == _normalized(re.sub("-[0-9]+GB", "", key))]


def _without_variant(name: str) -> str:
    """Return ``name`` without its form factor and memory size: "V100-SXM2-32GB" becomes "V100"."""
    return re.sub(r"[-_ ]*(sxm\d?|pcie|fhhl|\d+ *gb?)\b", "", name.casefold())


def _spellings() -> dict[str, str]:
    """Return the key of each name that is accepted, by the normalized name."""
    names = {key: key for key in ENTRIES} | {entry.nvml_name: key for key, entry in ENTRIES.items()} | ALIASES
    return {_normalized(name): key for name, key in names.items()}


def _refuse_dropped(text: str, name: str) -> None:
    """Raise the error for a GPU that is too old for vLLM. Else do nothing."""
    wanted = _normalized(_without_variant(name)).removeprefix("gtx")
    for model, capability in DROPPED.items():
        if _normalized(model).removeprefix("gtx") == wanted:
            actual, least = (".".join(map(str, pair)) for pair in (capability, MINIMUM_COMPUTE_CAPABILITY))
            problem = f"the {model} has compute capability {actual}, but vLLM needs {least} (Turing) or newer"
            raise UsageError(f"--hardware {text}", problem, "use a newer GPU, such as T4 or L4")


def _refuse_times(text: str, name: str, known: Mapping[str, str]) -> None:
    """Raise the error for a number of GPUs that is written as "H100x8", "H100*8" or "8 x H100". Else do nothing."""
    found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.+?)(?:\s*[x*]\s*(\d+))?", name.strip(), re.IGNORECASE)
    if found is None:
        return
    first, model, last = found.groups()
    if (first or last) and (_normalized(model) in known or _same_model(_normalized(model))):
        problem = f"{name.strip()!r} is not in the catalogue"
        raise UsageError(
            f"--hardware {text}", problem, f"write the number of GPUs after a colon: {model}:{last or first}"
        )


def _nearest(name: str) -> list[str]:
    """Return the keys whose names are most like ``name``, the most similar first. MIG slices only if it names one."""
    sliced = re.search(r"\dg\b|mig", name.casefold()) is not None
    scores: dict[str, float] = {}
    for spelling, key in _spellings().items():
        if sliced or "g." not in key:
            scores[key] = max(scores.get(key, 0.0), _similarity(_normalized(name), spelling))
    ranked = sorted((key for key, score in scores.items() if score >= _NEAR), key=lambda key: -scores[key])
    return ranked[:_MAX_NEAR]


def _similarity(wanted: str, spelling: str) -> float:
    """Return 0 to 1: the mean of the share of equal letters and of equal words and numbers, such as "a" and "6000".

    The letter o counts as a zero.
    """
    wanted, spelling = wanted.replace("o", "0"), spelling.replace("o", "0")
    letters = difflib.SequenceMatcher(None, wanted, spelling).ratio()
    ours, theirs = (set(re.findall(r"[a-z]+|[0-9]+", text)) for text in (wanted, spelling))
    shared = 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours | theirs else 0.0
    return (letters + shared) / 2 if ours & theirs else letters * 0.8


def _normalized(name: str) -> str:
    """Return ``name`` in lower case, without brand words, spaces and punctuation, to compare spellings."""
    return re.sub(r"nvidia|geforce|tesla|blackwell|generation|edition|[^a-z0-9.]", "", name.casefold())
