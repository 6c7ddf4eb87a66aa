"""Reads models by hub id: from the local cache, and with errors of the hub. No test uses a network."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from vllm_launch.errors import UsageError
from vllm_launch.model import hub
from vllm_launch.model.read import read_model, weight_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of some/model, with config.json, in an offline cache with huggingface_hub's layout."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    return snapshot


def test_the_files_of_a_chat_are_read_from_the_cache(cache: Path) -> None:
    (cache / "chat_template.jinja").write_text("{{ messages[0].content }}{{ tools }}")
    (cache / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<think>"}]}))
    chat = read_model("some/model").chat
    assert chat is not None
    assert (chat.renderer, chat.shows_tools, chat.tokens) == ("template", True, {"<think>"})


def test_a_large_tokenizer_is_not_read_if_a_small_file_lists_its_tokens(cache: Path) -> None:
    (cache / "tokenizer.json").write_text("broken")
    (cache / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"1": {"content": "<a>"}}}))
    chat = read_model("some/model").chat
    assert chat is not None
    assert (chat.renderer, chat.tokens) == ("none", {"<a>"})


def test_the_hub_lists_a_mistral_models_files_simulated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["MistralForCausalLM"]}))
    _simulate_headers(cache, monkeypatch, "BF16")
    names = ["tekken.json", "consolidated.safetensors"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_, **__: names)
    chat = read_model("some/model").chat
    assert chat is not None
    assert chat.renderer == "Mistral"


def weights(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(12)


def test_a_cached_model_is_read_offline(cache: Path) -> None:
    (cache / "model.safetensors").write_bytes(weights("a"))
    model = read_model("some/model")
    assert (model.tensors_from, [tensor.name for tensor in model.tensors], model.warnings) == ("safetensors", ["a"], ())


def test_cached_shards_are_those_of_the_index(cache: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    (cache / "one.safetensors").write_bytes(weights("a"))
    (cache / "two.safetensors").write_bytes(weights("b"))
    assert [tensor.name for tensor in read_model("some/model").tensors] == ["a", "b"]


def test_weight_files_are_listed_only_if_all_shards_are_cached(cache: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    (cache / "one.safetensors").write_bytes(weights("a"))
    assert weight_files("some/model") == []
    (cache / "two.safetensors").write_bytes(weights("b"))
    assert [path.name for path in weight_files("some/model")] == ["one.safetensors", "two.safetensors"]
    assert weight_files("some/other") == []


def test_a_cache_without_weights_gives_tensors_from_the_config_and_a_warning(cache: Path) -> None:
    assert cache.is_dir()
    model = read_model("some/model")
    assert model.tensors_from == "config"
    assert any("no safetensors" in warning for warning in model.warnings)


def test_small_files_in_the_cache_are_read(cache: Path) -> None:
    (cache / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8"}, "producer": {"name": "modelopt"}})
    )
    quantization = read_model("some/model").quantization
    assert quantization is not None
    assert quantization.method == "modelopt"


def test_an_uncached_model_offline_gives_the_download_command(cache: Path) -> None:
    assert cache.is_dir()
    with pytest.raises(UsageError, match=r"other/model: is not in the hub's cache.* run `hf download other/model`"):
        read_model("other/model")


def test_a_broken_file_in_the_cache_is_named(cache: Path) -> None:
    (cache / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: is not JSON"):
        read_model("some/model")


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None, text="", url="https://hub/x")
    return kind("long\ntext", response=response)


def transport_error() -> Exception:
    return type("ConnectError", (Exception,), {"__module__": "httpx2"})("no route")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            lambda: http_error(errors.GatedRepoError, 403),
            r"is gated; accept its licence at .*some/model and set HF_TOKEN",
        ),
        (lambda: http_error(errors.RepositoryNotFoundError, 404), r"no such model on the hub.*spelling"),
        (lambda: http_error(errors.RevisionNotFoundError, 404), r"has no revision 'v9'"),
        (lambda: http_error(errors.HfHubHTTPError, 503), r"the hub refused the request \(HTTP 503\)"),
        (
            lambda: http_error(errors.HfHubHTTPError, 401),
            r"rejects the token \(HTTP 401\); set HF_TOKEN to a valid token",
        ),
        (lambda: errors.OfflineModeIsEnabled("off"), r"HF_HUB_OFFLINE is set"),
        (lambda: errors.LocalEntryNotFoundError("gone"), r"at revision 'v9' and the hub cannot be reached"),
        (lambda: errors.EntryNotFoundError("gone"), r"has no config\.json"),
        (lambda: errors.SafetensorsParsingError("bad"), r"headers on the hub are broken"),
        (lambda: errors.HFValidationError("bad"), r"neither a folder nor a hub id"),
        (lambda: ConnectionResetError("reset"), r"cannot be reached \(ConnectionResetError\); check the network"),
        (lambda: UnicodeEncodeError("ascii", "Bearer é", 7, 8, "?"), r"token is not plain ASCII; check HF_TOKEN"),
        (transport_error, r"cannot be reached \(ConnectError\); check the network"),
        (lambda: PermissionError(13, "Permission denied", "/hub/x"), r"cache in .* \(Permission denied\); set HF_HOME"),
        (lambda: OSError(28, "No space left on device"), r"cache in .* \(No space left on device\); set HF_HOME"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_error_of_the_hub_becomes_one_line_simulated(
    error: Callable[[], Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(UsageError, match=text) as raised:
        read_model("some/model", revision="v9")
    assert "\n" not in str(raised.value)


def test_a_repository_of_gguf_files_without_a_config_is_called_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", _read_from(tmp_path))
    with pytest.raises(
        UsageError, match=r"unsloth/Qwen3-8B-GGUF: is a GGUF model. vLLM .* reads it only with vllm-gguf-plugin"
    ):
        read_model("unsloth/Qwen3-8B-GGUF")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        read_model("gguf/tools")


@pytest.mark.parametrize("verbosity", [None, "info"])
def test_the_hubs_client_logs_retries_only_with_hf_hub_verbosity(
    verbosity: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = logging.getLogger("huggingface_hub.utils._http")
    logs_warnings = []

    def download(*_: Any, **__: Any) -> str:
        logs_warnings.append(client.isEnabledFor(logging.WARNING))
        raise errors.LocalEntryNotFoundError("gone")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    if verbosity is not None:
        monkeypatch.setenv("HF_HUB_VERBOSITY", verbosity)
    logging.getLogger("huggingface_hub").setLevel(logging.INFO)  # as the client does at import with this variable
    with pytest.raises(UsageError):
        read_model("some/model")
    assert logs_warnings == [verbosity is not None]


def test_an_unexpected_exception_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(ZeroDivisionError):
        read_model("some/model")


def _simulate_headers(cache: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Simulate a hub with a model of one tensor, whose headers can be read by range requests."""
    tensor = SimpleNamespace(dtype=dtype, shape=[2, 3])
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors={"a": tensor})})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_download", _read_from(cache))
    monkeypatch.setattr(hub.HfApi, "get_safetensors_metadata", lambda *_, **__: metadata)


def test_headers_on_the_hub_are_read_by_range_simulated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _simulate_headers(cache, monkeypatch, "BF16")
    model = read_model("some/model")
    assert (model.tensors_from, model.tensors[0].shape) == ("safetensors", (2, 3))


def test_an_unknown_dtype_on_the_hub_is_refused_simulated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _simulate_headers(cache, monkeypatch, "F3")
    with pytest.raises(UsageError, match="model some/model: tensor 'a' has the unknown dtype 'F3'"):
        read_model("some/model")


def test_a_repository_without_safetensors_gives_tensors_from_the_config_simulated(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metadata(*_: Any, **__: Any) -> None:
        raise errors.NotASafetensorsRepoError("none")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_download", _read_from(cache))
    monkeypatch.setattr(hub.HfApi, "get_safetensors_metadata", metadata)
    assert read_model("some/model").tensors_from == "config"


def _read_from(folder: Path) -> Callable[..., str]:
    def download(_: str, filename: str, **__: Any) -> str:
        if not (folder / filename).is_file():
            raise errors.EntryNotFoundError(filename)
        return str(folder / filename)

    return download
