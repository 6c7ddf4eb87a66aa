"""Which quantisation each module of a checkpoint has: ignored modules, and modules with a scheme of their own. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

from vllm_launch.model.model import Quantization

_OUTER = re.compile(r"^(?:(?:model|language_model|text_model|llm|thinker|backbone|transformer|decoder)\.)+")
"""The outer modules of a language model. Configs and checkpoints nest them in different orders: one has
``model.language_model.layers.0``, the other ``language_model.model.layers.0``. vLLM maps them to each other
(model_executor/models/utils.py:WeightsMapper, QuantizationConfig.apply_vllm_mapper)."""


_EXPERT = re.compile(r"\.experts\.\d+\.")
_ONE_EXPERT = re.compile(r"experts\\?\.[\d\[(]")
"""In a pattern: the number of an expert, or a set of numbers."""


class Schemes:
    """The quantisation of each module of a checkpoint. Patterns are compiled once: a model can have 200,000 modules."""

    def __init__(self, quantization: Quantization | None) -> None:
        self._default = quantization
        self._ignored = _Patterns(quantization.ignored if quantization else ())
        own = quantization.own_schemes if quantization else ()
        self._own = [(_Patterns(targets), scheme) for targets, scheme in own]
        patterns = (*self._ignored.patterns, *(pattern for targets, _ in self._own for pattern in targets.patterns))
        self._experts_differ = any(_ONE_EXPERT.search(pattern) for pattern in patterns)
        self._known: dict[str, Quantization | None] = {}

    def of(self, module: str) -> Quantization | None:
        """Return the quantisation of ``module``, a name in the checkpoint, or None if it is not quantised."""
        # All experts of a layer have the answer of one of them, unless a pattern names an expert.
        name = module if self._experts_differ else _EXPERT.sub(".experts.0.", module)
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, module: str) -> Quantization | None:
        if self._default is None or self._ignored.match(module):
            return None
        return self.own(module) or (self._default if self._default.all_linear else None)

    def own(self, module: str) -> Quantization | None:
        """Return the scheme that the checkpoint gives ``module`` by name, or None."""
        return next((scheme for targets, scheme in self._own if targets.match(module)), None)


@functools.lru_cache(maxsize=8)
def schemes_of(quantization: Quantization | None) -> Schemes:
    """Return the schemes of a checkpoint. A plan asks for them with each of its layouts."""
    return Schemes(quantization)


class _Patterns:
    """Patterns of module names: names, parts of names, globs (``*``) or regexes (``re:``)."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._names: set[str] = set()
        starts: list[str] = []
        self._regexes: list[re.Pattern[str]] = []
        for pattern in self.patterns:
            inner = _OUTER.sub("", pattern)
            if pattern.startswith("re:"):
                try:
                    self._regexes.append(re.compile(pattern[3:]))
                except re.error:
                    continue
            elif "*" not in inner:
                self._names.add(inner)
            elif inner.index("*") == len(inner) - 1:
                starts.append(inner[:-1])
            else:
                self._regexes.append(re.compile(re.escape(inner).replace(r"\*", ".*") + r"(?:\.|$)"))
        self._starts = tuple(starts)

    def match(self, module: str) -> bool:
        """Whether a pattern names ``module``, or a module that contains it."""
        inner = _OUTER.sub("", module)
        if not self._names.isdisjoint(_parts(inner)):
            return True
        if inner.startswith(self._starts):
            return True
        names = {module, inner, f"model.{inner}", f"model.language_model.{inner}", f"language_model.model.{inner}"}
        return any(regex.match(name) for regex in self._regexes for name in names)


def _parts(module: str) -> Iterator[str]:
    """Yield every run of parts of a dotted name: "a.b.c" has "a", "a.b", "a.b.c", "b", "b.c" and "c"."""
    names = module.split(".")
    for first in range(len(names)):
        for last in range(first + 1, len(names) + 1):
            yield ".".join(names[first:last])
