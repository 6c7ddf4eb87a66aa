"""The real engine on the CPU under the supervisor. A start takes 45-130 s, so tests share one where they only read."""

import signal
import sys
from pathlib import Path

import pytest
from serving import Serving

sys.path.append(str(Path(__file__).parent))  # so that tests can import what stands here


@pytest.fixture(scope="session")
def serving_class():
    return Serving


@pytest.fixture
def start(tmp_path, tiny_model):
    """Starts one server; ends it by SIGQUIT if the test has not."""
    runs = []

    def begin(model=tiny_model, folder=tmp_path, **options):
        runs.append(Serving(folder, model, **options))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGQUIT)
            run.process.wait(60)


@pytest.fixture(scope="session")
def serving(tmp_path_factory, tiny_model):
    """One server for every test that only reads."""
    run = Serving(tmp_path_factory.mktemp("serving"), tiny_model)
    try:
        run.wait_for("vllm-launch: engine 0: KV cache")
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGQUIT)
            run.process.wait(60)
