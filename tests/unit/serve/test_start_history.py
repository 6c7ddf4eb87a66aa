import pytest

from vllm_launch.serve import start_history

PHASES = {"starting": 10.0, "loading weights": 20.5, "warming up": 3.0}


def test_a_start_reads_only_the_durations_of_the_last_start_with_its_key(tmp_path):
    path = tmp_path / "cache" / "starts.json"
    assert start_history.last_phases(path, "a") == {}
    start_history.remember(path, "a", PHASES)
    start_history.remember(path, "b", {"starting": 1.0})
    assert start_history.last_phases(path, "a") == PHASES
    start_history.remember(path, "a", {"starting": 2.0})
    assert start_history.last_phases(path, "a") == {"starting": 2.0}
    assert start_history.last_phases(path, "b") == {"starting": 1.0}
    assert [file.name for file in path.parent.iterdir()] == ["starts.json"]


def test_the_oldest_start_is_dropped(tmp_path):
    path = tmp_path / "starts.json"
    for number in range(start_history.MAX_STARTS + 1):
        start_history.remember(path, str(number), PHASES)
    assert start_history.last_phases(path, "0") == {}
    assert start_history.last_phases(path, "1") == PHASES


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 3}', '{"a": {"starting": "x"}}', '{"a": {"flying": 3.0, "starting": -1.0}}']
)
def test_an_invalid_file_is_ignored_and_overwritten(tmp_path, text):
    path = tmp_path / "starts.json"
    path.write_text(text)
    assert start_history.last_phases(path, "a") == {}
    start_history.remember(path, "a", PHASES)
    assert start_history.last_phases(path, "a") == PHASES


def test_a_file_that_cannot_be_written_is_ignored(tmp_path):
    (tmp_path / "file").touch()
    start_history.remember(tmp_path / "file" / "starts.json", "a", PHASES)
    assert start_history.last_phases(tmp_path / "file" / "starts.json", "a") == {}


def test_ports_and_python_do_not_change_the_key():
    argv = ["/a/python", "-m", "vllm", "serve", "m", "--host=0.0.0.0", "--port=1", "--max-model-len=8"]
    other = ["/b/python", "-m", "vllm", "serve", "m", "--port=2", "--max-model-len=8"]
    assert start_history.key(argv, ["H200"]) == start_history.key(other, ["H200"])
    assert start_history.key(argv, ["H200"]) != start_history.key(argv, ["H100"])
    assert start_history.key(argv, ["H200"]) != start_history.key([*argv, "--enforce-eager"], ["H200"])
