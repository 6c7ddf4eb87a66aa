"""The report of `make upgrade` (scripts/upgrade.py), from small inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/upgrade.py"
LOG = """
_________________ test_tokens_equal_vllms[0] _________________
    def test_tokens_equal_vllms(case):
E   TypeError: takes 1 argument
E   more
_________________ test_tokens_equal_vllms[1] _________________
E   TypeError: takes 1 argument
___________ ERROR at setup of test_start ___________
E   OSError: no port
FAILED tests/engine/test_kv.py::test_tokens_equal_vllms[0] - TypeError: takes 1 argument
FAILED tests/engine/test_kv.py::test_tokens_equal_vllms[1]
ERROR tests/engine/test_start.py::test_start
FAILED tests/engine/test_start.py::test_silent
"""


@pytest.fixture(scope="module")
def upgrade():
    spec = importlib.util.spec_from_file_location("upgrade", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_failures_are_reported_by_test_with_their_first_error(upgrade):
    assert upgrade.grouped_failures(LOG) == [
        "tests/engine/test_kv.py::test_tokens_equal_vllms (2 cases): TypeError: takes 1 argument",
        "tests/engine/test_start.py::test_start: OSError: no port",
        "tests/engine/test_start.py::test_silent: see the log",
    ]


def test_of_two_rows_only_what_differs_is_reported_and_of_two_lists_only_the_entries(upgrade):
    old = {"default": 1, "choices": ["a", "b"], "kind": "int"}
    new = {"default": 2, "choices": ["b", "c"], "kind": "int"}
    assert upgrade.difference(old, new) == {"default": "1 → 2", "choices": {"new": ["c"], "gone": ["a"]}}
    assert upgrade.moved({"x": old, "gone": old}, {"x": new, "added": 1}) == [
        "new: `added` 1",
        "gone: `gone`",
        'changed: `x` {"default": "1 → 2", "choices": {"new": ["c"], "gone": ["a"]}}',
    ]
