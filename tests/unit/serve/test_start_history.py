import pytest

from vllm_launch.serve import start_history

PHASES = {"starting": 10.0, "loading weights": 20.5, "warming up": 3.0}


def test_what_a_start_took_is_known_to_the_next_one_of_its_kind_alone(tmp_path):
    path = tmp_path / "cache" / "starts.json"
    assert start_history.usual(path, "a") == {}
    start_history.remember(path, "a", PHASES)
    start_history.remember(path, "b", {"starting": 1.0})
    assert start_history.usual(path, "a") == PHASES
    start_history.remember(path, "a", {"starting": 2.0})
    assert start_history.usual(path, "a") == {"starting": 2.0}
    assert start_history.usual(path, "b") == {"starting": 1.0}
    assert [file.name for file in path.parent.iterdir()] == ["starts.json"]


def test_the_oldest_are_forgotten(tmp_path):
    path = tmp_path / "starts.json"
    for number in range(start_history.KEPT + 1):
        start_history.remember(path, str(number), PHASES)
    assert start_history.usual(path, "0") == {}
    assert start_history.usual(path, "1") == PHASES


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 3}', '{"a": {"starting": "x"}}', '{"a": {"flying": 3.0, "starting": -1.0}}']
)
def test_a_file_that_is_not_ours_tells_nothing_and_is_no_obstacle(tmp_path, text):
    path = tmp_path / "starts.json"
    path.write_text(text)
    assert start_history.usual(path, "a") == {}
    start_history.remember(path, "a", PHASES)
    assert start_history.usual(path, "a") == PHASES


def test_a_cache_that_cannot_be_written_is_passed_over(tmp_path):
    (tmp_path / "file").touch()
    start_history.remember(tmp_path / "file" / "starts.json", "a", PHASES)
    assert start_history.usual(tmp_path / "file" / "starts.json", "a") == {}


def test_starts_are_of_one_kind_whatever_their_ports_and_python():
    argv = ["/a/python", "-m", "vllm", "serve", "m", "--host=0.0.0.0", "--port=1", "--max-model-len=8"]
    other = ["/b/python", "-m", "vllm", "serve", "m", "--port=2", "--max-model-len=8"]
    assert start_history.key(argv, ["H200"]) == start_history.key(other, ["H200"])
    assert start_history.key(argv, ["H200"]) != start_history.key(argv, ["H100"])
    assert start_history.key(argv, ["H200"]) != start_history.key([*argv, "--enforce-eager"], ["H200"])
