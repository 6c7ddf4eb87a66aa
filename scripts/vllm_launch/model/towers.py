"""The tensors of a model's vision and audio towers, from config.json. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from vllm_launch.engine.towers import Tower
from vllm_launch.model.config import Config
from vllm_launch.model.model import TowerPart
from vllm_launch.model.tensor_list import TensorList

_TEXT_HIDDEN = re.compile(r"(?:^|\.)(?:text|llm|language)_config\.hidden_size$")
_WIDTH = re.compile(r"(?:^|[._])(?:hidden_size|embed_dim|d_model|width|intermediate_size|mlp_dim|ffn_dim)$")
_NOT_THE_TOWERS = re.compile(r"(?:out|text|projector|mm)_hidden_size$|(?:text|llm|language)_config")


def append_tower(tensor_list: TensorList, tower: Tower, root: Config, hidden: int) -> None:
    """Append the tensors of ``tower``. ``root`` is config.json, ``hidden`` the language model's hidden size."""
    size = _sizes(tower, root, hidden)
    for row in tower.tensors:
        shape = [evaluate(formula, size) for formula in row.shape]
        part = TowerPart(modalities=row.modalities, split=row.split == "split")
        for number in range(evaluate(row.count, size)):
            tensor_list.add(row.name.replace("*", str(number), 1), *shape, tower=part)


def append_plain_tower(tensor_list: TensorList, config: Config, text_hidden: int) -> None:
    """Append a plain ViT with the sizes of vision_config, and a projection to ``text_hidden`` channels."""
    hidden = config.integer("hidden_size", "embed_dim", "width", default=1024)
    width = config.integer("intermediate_size", "mlp_dim", default=4 * hidden)
    patch = config.integer("patch_size", default=14)
    channels = config.integer("num_channels", "in_channels", default=3)
    matrices, vectors = (TowerPart(modalities=("image", "video"), split=split) for split in (True, False))
    tensor_list.add("vision_tower.patch_embed.weight", hidden, channels, patch, patch, tower=vectors)
    for n in range(config.integer("num_hidden_layers", "depth", "layers", default=24)):
        prefix = f"vision_tower.layers.{n}."
        for name, rows, columns in (("qkv_proj", 3 * hidden, hidden), ("out_proj", hidden, hidden),
                                    ("fc1", width, hidden), ("fc2", hidden, width)):  # fmt: skip
            tensor_list.add(f"{prefix}{name}.weight", rows, columns, tower=matrices)
            tensor_list.add(f"{prefix}{name}.bias", rows, tower=vectors)
        for name in ("layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias"):
            tensor_list.add(prefix + name, hidden, tower=vectors)
    tensor_list.add("multi_modal_projector.linear.weight", text_hidden, hidden, tower=matrices)


def encoder_bytes_per_token(tower: Tower, root: Config, hidden: int) -> int | None:
    """Return the most bytes that the encoder has alive per token of its output, in 16-bit numbers, or None.

    The table's value is for the tower in ``tower.keys``. For another one it grows like the channel count that grows
    most, which is never too little.
    """
    if tower.bytes_per_token is None:
        return None
    size = _sizes(tower, root, hidden)
    ratios = [
        size(path) / default
        for path, default in tower.keys.items()
        if _WIDTH.search(path) and not _NOT_THE_TOWERS.search(path)
    ]
    return math.ceil(tower.bytes_per_token * max(ratios, default=1.0))


def evaluate(formula: str, size: Callable[[str], int]) -> int:
    """Return the value of a formula such as "3*vision_config.hidden_size+1". ``size`` returns a key's value."""
    total = Fraction(0)
    for term in filter(None, re.split(r"(?<!\^)(?=[+-])", formula)):
        product = Fraction(-1 if term.startswith("-") else 1)
        for factor in term.lstrip("+-").split("*"):
            name, _, power = factor.partition("^")
            value = Fraction(name) if name[0].isdigit() else Fraction(size(name))
            product *= value ** int(power or 1)
        total += product
    return max(0, math.floor(total))


def _sizes(tower: Tower, root: Config, hidden: int) -> Callable[[str], int]:
    """Return a function from a key's path to its value in config.json, or to its default."""

    def size(path: str) -> int:
        if _TEXT_HIDDEN.search(path):
            return hidden
        *tables, key = path.split(".")
        config = root
        for table in tables:
            config = Config(config.table(table) or {}, f"{config.where} {table}")
        value = config.get(key)
        if isinstance(value, list):  # a size has one value for each axis, and other lists count as their length
            return int(value[0]) if key.endswith("size") and value and isinstance(value[0], int) else len(value)
        return config.integer(key, default=tower.keys[path])

    return size
