"""Names of models that are neither folders nor hub ids give one line, and never a wrong reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_launch.__main__ import main
from vllm_launch.engine.options import pinned_vllm
from vllm_launch.errors import UsageError
from vllm_launch.model.names import refuse_address, refuse_modelscope
from vllm_launch.model.read import read_model


def refusal(name: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read_model(name)
    assert "\n" not in str(caught.value)
    assert "no such folder" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["s3://bucket/model", "S3://bucket/model/", "gs://b/m", "az://container/m"])
def test_object_storage_is_what_vllm_can_read_and_the_plan_cannot(name: str) -> None:
    error = refusal(name)
    assert "vLLM can stream it, but the plan reads only a local folder or the hub" in error.problem
    assert "give the folder" in error.remedy


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B@main", "Qwen/Qwen3-8B"),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "Qwen/Qwen3-8B"),
        ("https://www.huggingface.co/Qwen/Qwen3-8B?library=vllm", "Qwen/Qwen3-8B"),
        ("http://hf-mirror.com/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("https://hf.co/gpt2", "gpt2"),
        ("huggingface.co/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
    ],
)
def test_an_address_on_the_hub_is_answered_with_its_id(name: str, hub_id: str) -> None:
    assert refusal(name).remedy == f"give the hub id alone: {hub_id}"


@pytest.mark.parametrize(
    "name", ["https://modelscope.cn/models/Qwen/Qwen3-8B/summary", "modelscope://Qwen/Qwen3-8B", "ms://Qwen/Qwen3-8B"]
)
def test_an_address_on_modelscope_is_answered_with_the_download_command(name: str) -> None:
    assert "modelscope download --model Qwen/Qwen3-8B --local_dir FOLDER" in refusal(name).remedy


@pytest.mark.parametrize("value", ["1", "true", "True "])
def test_a_name_that_vllm_would_look_up_on_modelscope_is_not_looked_up_on_the_hub(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", value)
    error = refusal("Qwen/Qwen3-8B")
    assert "is on ModelScope (VLLM_USE_MODELSCOPE), which vLLM can read, but the plan cannot" in error.problem


@pytest.mark.parametrize("value", ["", "0", "False"])
def test_modelscope_that_is_off_refuses_nothing(value: str) -> None:
    refuse_modelscope("Qwen/Qwen3-8B", {"VLLM_USE_MODELSCOPE": value})


def test_a_folder_is_planned_even_with_modelscope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    folder = Path(__file__).parents[2] / "data/models/meta-llama--Meta-Llama-3-8B"
    assert read_model(str(folder)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/Qwen3-8B-GGUF:Q4_K_M",
        "unsloth/Qwen3-8B-GGUF:UD-IQ2_XXS",
        "unsloth/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf",
        "/models/absent.GGUF",
        "https://huggingface.co/unsloth/Qwen3-8B-GGUF/resolve/main/Qwen3-8B-Q4_K_M.gguf",
    ],
)
def test_gguf_needs_a_plugin(name: str) -> None:
    error = refusal(name)
    assert f"is a GGUF model. vLLM {pinned_vllm()} reads it only with vllm-gguf-plugin" in error.problem
    assert error.remedy == "use the safetensors checkpoint of the model"


def test_a_folder_with_only_gguf_is_not_told_to_add_a_config(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a GGUF model" in refusal(str(tmp_path)).problem


@pytest.mark.parametrize("name", ["ollama://llama3", "https://bucket.s3.amazonaws.com/a/b", "hdfs://a/b", "oci://x/y"])
def test_another_address_is_not_called_a_missing_folder(name: str) -> None:
    assert refusal(name).problem == f"is an address that vLLM {pinned_vllm()} does not load"


def test_a_file_address_is_answered_with_its_path() -> None:
    assert refusal("file:///models/qwen").remedy == "give the path alone: /models/qwen"


@pytest.mark.parametrize("name", ["s3://bucket/model", "hf://Qwen/Qwen3-8B", "unsloth/Qwen3-8B-GGUF:Q4_K_M"])
def test_download_refuses_the_same_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", name]) == 2
    assert capsys.readouterr().err.startswith(f"vllm-launch: model {name}: is ")


@given(st.text() | st.from_regex(r"[a-z0-9]{1,5}://?[a-z/.@?:]*"))
@example("s3://")
def test_any_name_is_accepted_or_refused_with_one_line(name: str) -> None:
    try:
        refuse_address(name)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  either outcome is right


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2", "./s3", "org/gguf-tools", "/models/q4", "a:b"])
def test_names_that_vllm_loads_are_not_refused(name: str) -> None:
    refuse_address(name)
