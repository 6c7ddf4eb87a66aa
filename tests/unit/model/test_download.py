"""Tests of `vllm-launch download`. They replace functions of the hub's client. tests/cluster runs the whole client."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from vllm_launch import commands
from vllm_launch.__main__ import main
from vllm_launch.errors import UsageError
from vllm_launch.model import hub


@pytest.fixture
def simulated_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The state of a simulated hub: "files" that it has, and the arguments of the last download."""
    for name in [name for name in os.environ if name.startswith(("LAUNCH_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    state: dict[str, Any] = {"files": ["config.json", "model.safetensors", "pytorch_model.bin"]}

    def snapshot_download(name: str, **options: Any) -> str:
        state.update(options, name=name)
        return f"{tmp_path}/snapshot"

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: state["files"])
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return state


@pytest.mark.parametrize(
    ("files", "pickled"), [(["a.safetensors", "a.bin"], False), (["config.json", "pytorch_model.bin"], True)]
)
def test_pickled_weights_are_downloaded_only_without_safetensors(
    simulated_hub: dict[str, Any], files: list[str], *, pickled: bool
) -> None:
    simulated_hub["files"] = files
    hub.download("some/model", revision="v2", token="t")
    assert (simulated_hub["name"], simulated_hub["revision"], simulated_hub["token"]) == ("some/model", "v2", "t")
    assert ("*.bin" not in simulated_hub["ignore_patterns"]) is pickled
    assert {"original/*", "*.gguf"} <= set(simulated_hub["ignore_patterns"])


def test_a_finished_download_is_marked_for_its_revision(simulated_hub: dict[str, Any]) -> None:
    assert not hub.downloaded("some/model")
    hub.download("some/model")
    assert simulated_hub["name"] == "some/model"
    assert hub.downloaded("some/model")
    assert not hub.downloaded("some/model", "v2")
    assert not hub.downloaded("some/other")


@pytest.mark.usefixtures("simulated_hub")
def test_abandoned_partial_files_are_removed(tmp_path: Path) -> None:
    blobs = tmp_path / "hub/models--some--model/blobs"
    blobs.mkdir(parents=True)
    for name, age in (("old.incomplete", hub.ABANDONED_AFTER_S + 60), ("new.incomplete", 5), ("whole", 99999)):
        (blobs / name).touch()
        os.utime(blobs / name, (time.time() - age,) * 2)
    hub.download("some/model")
    assert sorted(path.name for path in blobs.iterdir()) == ["new.incomplete", "whole"]


def test_a_full_disk_gives_one_line(simulated_hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", no_space)
    with pytest.raises(UsageError, match=r"the hub's cache in .* cannot be used \(No space left on device\)"):
        hub.download("some/model")
    assert "name" not in simulated_hub
    assert not hub.downloaded("some/model")


def test_the_command_downloads_what_the_config_file_names(
    simulated_hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("model: some/model\nrevision: v2\n")
    assert main(["download", "--config", str(tmp_path / "config.yaml")]) == 0
    assert simulated_hub["revision"] == "v2"
    assert capsys.readouterr().out == f"some/model is in {tmp_path}/snapshot\n"


@pytest.mark.usefixtures("simulated_hub")
def test_wait_ends_when_another_process_has_downloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "WAIT_S", 0.05)
    download = threading.Timer(0.2, hub.download, ["some/model"])
    download.start()
    assert main(["download", "--wait", "some/model"]) == 0
    download.join()
    assert set(capsys.readouterr().out.splitlines()) == {"some/model: waiting until it is downloaded"}


@pytest.mark.parametrize("model", ["/models/a", "./a", "."])
def test_a_folder_cannot_be_downloaded(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", model]) == 2
    assert capsys.readouterr().err.startswith(f"vllm-launch: model {model}: is a path, and download takes")
