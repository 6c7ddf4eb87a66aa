"""Reads a model's files. A broken file gives a one-line error that names it. Weights are never read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_launch.errors import UsageError
from vllm_launch.model.checkpoint import HEADER_LIMIT, parse_header, read_folder, read_header, shard_names
from vllm_launch.model.model import Tensor
from vllm_launch.model.read import open_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def header(**entries: object) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype: str = "BF16", shape: object = (2, 3), offsets: object = (0, 12)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, entries: bytes, data_bytes: int) -> Path:
    path.write_bytes(len(entries).to_bytes(8, "little") + entries + bytes(data_bytes))
    return path


def folder_with(tmp_path: Path, **files: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(json.dumps(content))
    return tmp_path


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert error.value.remedy
    return text


def test_a_header_gives_names_dtypes_and_shapes(tmp_path: Path) -> None:
    entries = header(__metadata__={"format": "pt"}, a=entry(), b=entry("F32", [1], [12, 16]))
    path = write(tmp_path / "model.safetensors", entries, 16)
    assert read_header(path) == (Tensor("a", "BF16", (2, 3)), Tensor("b", "F32", (1,)))


def test_scalars_and_empty_tensors_are_read() -> None:
    tensors = parse_header(header(s=entry("F32", [], [0, 4]), e=entry("F32", [0, 7], [4, 4])), "f", 4)
    assert {tensor.name: tensor.shape for tensor in tensors} == {"s": (), "e": (0, 7)}


def test_two_four_bit_elements_share_a_byte() -> None:
    assert parse_header(header(w=entry("F4", [2, 3], [0, 3])), "f", 3)[0].dtype == "F4"


@pytest.mark.parametrize(
    ("entries", "data_bytes", "message"),
    [
        (header(w=entry(dtype="X9")), 12, "X9"),
        (header(w=entry(dtype=7)), 12, "dtype"),
        (header(w=entry(shape=[2, -3])), 12, "shape"),
        (header(w=entry(shape=[2, True])), 12, "shape"),
        (header(w=entry(shape="23")), 12, "shape"),
        (header(w=entry(shape=[2**62] * 40)), 12, "does not match"),
        (header(w=entry(offsets=[0])), 12, "offsets"),
        (header(w=entry(offsets=[12, 0])), 12, "does not match"),
        (header(w=entry(offsets=[0, 11])), 11, "does not match"),
        (header(w=entry(offsets=[0, 1.5])), 12, "offsets"),
        (header(w=[1]), 12, "not an object"),
        (header(w=entry()), 11, "12 bytes, but the file holds 11"),
        (header(w=entry()), 13, "12 bytes, but the file holds 13"),
        (header(w=entry(), v=entry()), 12, "overlaps"),
        (header(w=entry(), v=entry(offsets=[13, 25])), 25, "gap"),
        (b'{"w": 1, "w": 2}', 0, "twice"),
        (b"[]", 0, "not an object"),
        (b"{", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
    ],
)
def test_a_wrong_header_gives_one_line_that_names_the_file(entries: bytes, data_bytes: int, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_header(entries, "model.safetensors", data_bytes)
    text = one_line(error)
    assert text.startswith("model.safetensors: ")
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"\x08\0\0", "cut off"),
        ((10**6).to_bytes(8, "little") + b"{}", "1000000 bytes"),
        ((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}", "header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "LFS"),
    ],
)
def test_a_truncated_file_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_header(path)
    assert message in one_line(error)
    assert str(path) in str(error.value)


def test_only_the_header_of_a_file_is_read(tmp_path: Path) -> None:
    entries = header(w=entry("U8", [2**40], [0, 2**40]))
    path = write(tmp_path / "model.safetensors", entries, 0)
    with path.open("r+b") as file:
        file.truncate(8 + len(entries) + 2**40)  # a sparse file takes no disk space
    assert read_header(path) == (Tensor("w", "U8", (2**40,)),)


def test_a_folder_with_only_a_config_has_no_tensors(tmp_path: Path) -> None:
    checkpoint = read_folder(folder_with(tmp_path))
    assert checkpoint.tensors is None
    assert checkpoint.files["config.json"] == CONFIG


def test_shards_of_an_index_are_joined(tmp_path: Path) -> None:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    folder = folder_with(tmp_path, model__safetensors__index__json={"weight_map": weight_map})
    for number, name in ((1, "a"), (2, "b")):
        write(folder / f"model-{number}.safetensors", header(**{name: entry()}), 12)
    write(folder / "consolidated.safetensors", header(c=entry()), 12)
    assert [tensor.name for tensor in read_folder(folder).tensors or ()] == ["a", "b"]


def test_the_same_weights_in_two_layouts_count_once(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    write(folder / "model.safetensors", header(w=entry()), 12)
    write(folder / "consolidated.safetensors", header(w=entry()), 12)
    assert read_folder(folder).tensors == (Tensor("w", "BF16", (2, 3)),)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    folder = folder_with(tmp_path, model__safetensors__index__json={"weight_map": weight_map})
    write(folder / "model-1.safetensors", header(a=entry()), 12)
    with pytest.raises(UsageError) as error:
        read_folder(folder)
    assert "1 of its 2 shards" in one_line(error)
    assert "model-2.safetensors" in str(error.value)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    write(folder / "model-1.safetensors", header(a=entry()), 12)
    write(folder / "model-2.safetensors", header(a=entry()), 12)
    with pytest.raises(UsageError) as error:
        read_folder(folder)
    assert "model-1.safetensors" in one_line(error)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": "../evil.safetensors"}, {"a": 3}, {"a": "weights.bin"}])
def test_an_index_with_a_wrong_file_name_is_an_error(weight_map: object) -> None:
    with pytest.raises(UsageError) as error:
        shard_names({"weight_map": weight_map}, "index.json")
    assert "weight_map" in one_line(error)


@pytest.mark.parametrize(("name", "kind"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickles")])
def test_weights_in_another_format_are_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    folder = folder_with(tmp_path)
    (folder / name).write_bytes(bytes(2**17))
    with pytest.raises(UsageError) as error:
        read_folder(folder)
    assert kind in one_line(error)


def test_a_small_bin_file_does_not_count_as_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "training_args.bin").write_bytes(bytes(5000))
    assert read_folder(folder).tensors is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "list"),
        (b"null", "null"),
        (b"\xff", "UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_config_that_is_no_object_gives_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_folder(tmp_path)
    assert message in one_line(error)
    assert "config.json" in str(error.value)


def test_a_broken_link_into_the_hubs_cache_is_an_incomplete_download(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(UsageError, match=r"1 of its 1 shards are not in .*: model\.safetensors; finish"):
        read_folder(folder)


def test_shards_without_an_index_are_counted_by_their_names(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    for place, name in enumerate(("a-1-of-2", "a-2-of-2", "adapter"), 1):
        write(folder / f"{name}.safetensors", header(**{f"t{place}": entry()}), 12)
    assert len(read_folder(folder).tensors or ()) == 3
    (folder / "a-2-of-2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"1 of its 2 shards are not in .*: a-2-of-2\.safetensors"):
        read_folder(folder)


@pytest.mark.parametrize("inside", ["", "m"])
def test_a_folder_without_permission_gives_one_line(tmp_path: Path, inside: str) -> None:
    folder = folder_with(tmp_path)
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may enter every folder
        os.seteuid(65534)
    try:
        with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\); .*permissions"):
            open_checkpoint(str(folder / inside))
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["~no-such-user/m", "x" * 300, "./" + "x" * 300])
def test_an_impossible_folder_name_gives_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"no such folder|cannot be read \(File name too long\)"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/no-such-model", "a/b/c", "", "a\0b"])
def test_a_missing_local_path_is_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(UsageError) as error:
        open_checkpoint(name)
    one_line(error)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", header(), 0)
    with pytest.raises(UsageError) as error:
        open_checkpoint(str(path))
    assert "is a file" in one_line(error)


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(UsageError, match=r"params\.json"):
        open_checkpoint(str(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["BF16", "F4"]) | JSON, "shape": JSON, "data_offsets": JSON}
)


def tensors_or_one_line(content: bytes, data_bytes: int) -> None:
    try:
        parse_header(content, "f", data_bytes)
    except UsageError as error:
        text = str(error)
    else:
        return
    assert "\n" not in text


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 100))
def test_any_bytes_give_tensors_or_one_line(content: bytes, data_bytes: int) -> None:
    tensors_or_one_line(content, data_bytes)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4), st.integers(0, 100))
def test_any_json_header_gives_tensors_or_one_line(entries: dict[str, object], data_bytes: int) -> None:
    tensors_or_one_line(json.dumps(entries).encode(), data_bytes)
