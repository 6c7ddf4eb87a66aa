"""Tests of the probe with a simulated torch: GPUs are names, tensors are lists, each test decides what a copy does."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_launch.machine import p2p_probe
from vllm_launch.machine.p2p import judge

GPUS = (4, 5, 6)


class Tensor:
    def __init__(self, torch: FakeTorch, device: str, values: list[int]) -> None:
        self.torch, self.device, self.values = torch, device, values

    def __mul__(self, factor: int) -> Tensor:
        return Tensor(self.torch, self.device, [value * factor for value in self.values])

    def __add__(self, term: int) -> Tensor:
        return Tensor(self.torch, self.device, [value + term for value in self.values])

    def copy_(self, other: Tensor) -> None:
        self.torch.copies.append((other.device, self.device))
        if self.torch.arrives(len(self.torch.copies), other.device, self.device):
            self.values = other.values


class FakeTorch:
    int32 = "int32"

    def __init__(self, gpus: int = 2, *, peers: Any = None, arrives: Any = None) -> None:
        self.copies: list[tuple[str, str]] = []
        self.arrives = arrives or (lambda *_: True)
        self.cuda = SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            can_device_access_peer=peers or (lambda *_: True),
            synchronize=lambda _: None,
        )

    def arange(self, count: int, *, dtype: str, device: str) -> Tensor:
        assert dtype == self.int32
        return Tensor(self, device, list(range(count)))

    def full_like(self, like: Tensor, value: int) -> Tensor:
        return Tensor(self, like.device, [value] * len(like.values))

    def equal(self, first: Tensor, second: Tensor) -> bool:
        assert first.device == second.device
        return first.values == second.values


@pytest.fixture
def run_probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(p2p_probe, "_WORDS", 4)

    def run(torch: FakeTorch | None) -> str:
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert p2p_probe.main() == 0
        return capsys.readouterr().out

    return run


def test_every_ordered_pair_is_copied_with_an_event_before_and_after_simulated(run_probe: Any) -> None:
    torch = FakeTorch(3)
    output = run_probe(torch)
    pairs = [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line.get("pair") for line in lines] == [pair for pair in pairs for _ in "ab"] + [None]
    assert [line["event"] for line in lines] == ["copying", "copied"] * 6 + ["done"]
    assert set(torch.copies) == {(f"cuda:{source}", f"cuda:{target}") for source, target in pairs}
    assert judge(output, GPUS, status=0).ok is True


@pytest.mark.parametrize("failed_copy", [1, 2, 3])
def test_one_copy_that_does_not_arrive_fails_the_pair_simulated(run_probe: Any, failed_copy: int) -> None:
    output = run_probe(FakeTorch(2, arrives=lambda count, *_: count != failed_copy))
    verdict = judge(output, GPUS, status=0)
    assert (verdict.ok, verdict.pairs_failed) == (False, ((4, 5),))


def test_pairs_that_are_not_peers_for_cuda_are_not_copied_simulated(run_probe: Any) -> None:
    # can_device_access_peer(device, peer): whether `device` can access the memory of `peer`.
    torch = FakeTorch(2, peers=lambda device, peer: (device, peer) == (1, 0))
    run_probe(torch)
    assert set(torch.copies) == {("cuda:0", "cuda:1")}


@pytest.mark.parametrize(("torch", "why"), [(None, "torch cannot be loaded"), (FakeTorch(0), "sees no CUDA device")])
def test_the_probe_reports_why_it_cannot_copy_simulated(run_probe: Any, torch: FakeTorch | None, why: str) -> None:
    verdict = judge(run_probe(torch), GPUS, status=0)
    assert verdict.ok is None
    assert why in verdict.why
