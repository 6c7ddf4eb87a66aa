"""CI's suite runner (.ci/suites.py), with one-line suites."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci/suites.py"
SLOW = "printf '12.50s call     tests/a.py::test_b[x y]\\n0.01s setup    tests/a.py::test_c\\n'"


@pytest.fixture
def suites(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("suites", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "ci")
    return module


def test_a_failed_suite_fails_the_run_and_the_others_still_run(suites, monkeypatch, capsys):
    monkeypatch.setattr(
        suites,
        "PHASES",
        (
            (
                (("bad", "echo before; echo FAILED tests/a.py::test_d - why; exit 3"), ("next", "echo after")),
                (("good", SLOW),),
            ),
        ),
    )
    assert suites.main() == 1
    output = capsys.readouterr().out
    assert "==== bad: output\nbefore\n" in output
    assert output.count("\nbad: FAILED tests/a.py::test_d - why\n") == 1
    assert re.search(
        r"cores of .*, with(out)? AMX; at least [\d.]+ GiB of memory and [\d.]+ GiB of disk were free", output
    )
    assert "==== bad: failed after 0.0 min" in output
    assert "==== next: output\nafter\n" in output
    assert "good             passed after 0.0 min" in output
    assert "   12.5 s  tests/a.py::test_b[x y]" in output
    assert (suites.LOGS / "summary.txt").read_text() in output


def test_the_run_passes_if_all_suites_pass(suites, monkeypatch):
    monkeypatch.setattr(suites, "PHASES", (((("one", "true"),), (("two", "true"),)),))
    assert suites.main() == 0


def test_lanes_run_in_parallel(suites, monkeypatch, tmp_path):
    """Each lane waits for a file that the other lane creates."""
    wait = "until [ -e {theirs} ]; do sleep 0.05; done"
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(
        suites,
        "PHASES",
        (
            (
                (("one", f"touch {first}; {wait.format(theirs=second)}"),),
                (("two", f"touch {second}; {wait.format(theirs=first)}"),),
            ),
        ),
    )
    assert suites.main() == 0


def test_a_phase_begins_when_all_lanes_of_the_one_before_have_ended(suites, monkeypatch, tmp_path):
    done = tmp_path / "done"
    slow, after = f"sleep 0.5; touch {done}", f"test -e {done}"
    monkeypatch.setattr(suites, "PHASES", (((("quick", "true"),), (("slow", slow),)), ((("after", after),),)))
    assert suites.main() == 0


def test_every_suite_is_a_make_target_or_the_cluster_kit(suites):
    makefile = (SCRIPT.parents[1] / "Makefile").read_text()
    names = [name for phase in suites.PHASES for lane in phase for name, _ in lane]
    assert len(set(names)) == len(names)
    others = [name for name in names if f"\n{name}:" not in makefile]
    assert others == (["cluster-kit"] if suites.HAS_KIT else [])
