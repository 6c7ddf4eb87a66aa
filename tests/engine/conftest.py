"""The real engine on the CPU under the supervisor.

A start takes 45-130 s, so tests share one. What ends a shared run is the last test on it.
"""

import contextlib
import sys
from pathlib import Path

import pytest
from serving import Serving, begun

sys.path.append(str(Path(__file__).parent))  # so that tests can import what stands here


@pytest.fixture(scope="session")
def serving_class():
    return Serving


@pytest.fixture
def start(tmp_path, tiny_model):
    """Starts one server; ends it by SIGQUIT if the test has not."""
    with contextlib.ExitStack() as stack:

        def begin(model=tiny_model, folder=tmp_path, **options):
            return stack.enter_context(begun(folder, model, **options))

        yield begin


STRICT = '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}'
"""The tiny model is random: it would fill with white space what a grammar allows it to."""


@pytest.fixture(scope="session")
def serving(tmp_path_factory, tiny_model):
    """One server for every test that only reads; the last test of test_serving.py ends it."""
    with begun(tmp_path_factory.mktemp("serving"), tiny_model, flags=[STRICT]) as run:
        run.wait_for("vllm-launch: engine 0: KV cache")
        yield run
