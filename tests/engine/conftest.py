"""Fixtures for tests of the real vLLM on the CPU, run by the supervisor.

A start takes 45-130 s, so tests share one run. A test that ends a shared run is the last one that uses it.
"""

import contextlib
import sys
from pathlib import Path

import pytest
from serving import Serving, begun

sys.path.append(str(Path(__file__).parent))  # so that tests can import modules of this folder


@pytest.fixture(scope="session")
def serving_class():
    return Serving


@pytest.fixture
def start(tmp_path, tiny_model):
    """Return a function that starts a server. After the test, SIGQUIT ends each server that still runs."""
    with contextlib.ExitStack() as stack:

        def begin(model=tiny_model, folder=tmp_path, **options):
            return stack.enter_context(begun(folder, model, **options))

        yield begin


STRICT = '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}'
"""Forbids white space between JSON's tokens. The tiny model has random weights and would generate only white space."""


@pytest.fixture(scope="session")
def shared(tmp_path_factory, tiny_model):
    """Return a function that returns the shared server. It starts one at the first call, and after a server died."""
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
    """Return the shared server, for tests that do not change its state. The last test of test_serving.py ends it.

    If the server dies during a test, that test fails with the server's log. The next test gets a new server.
    """
    run = shared()
    yield run
    if code := run.process.poll():
        pytest.fail(f"the shared server ended with {code}:\n{run.log.read_text(errors='replace')[-4000:]}")
