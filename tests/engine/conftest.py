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
def shared(tmp_path_factory, tiny_model):
    """Returns the server that tests share: starts it at first, and another once it has died."""
    with contextlib.ExitStack() as stack:
        runs = []

        def current():
            if not runs or runs[-1].process.poll() is not None:
                folder = tmp_path_factory.mktemp("serving")
                runs.append(stack.enter_context(begun(folder, tiny_model, flags=[STRICT])))
                runs[-1].wait_for("vllm-launch: engine 0: KV cache")
            return runs[-1]

        yield current


@pytest.fixture
def serving(shared):
    """One server for every test that only reads; the last test of test_serving.py ends it.

    The test during which it dies fails with its log, and the next test has another: one death is one failure.
    """
    run = shared()
    yield run
    if code := run.process.poll():
        pytest.fail(f"the shared server ended with {code}:\n{run.log.read_text(errors='replace')[-4000:]}")
