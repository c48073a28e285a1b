"""Who computes: Triton's kernels where they have been seen to give what torch gives, and torch everywhere else.

What the comparison itself sees, `tests/interpreted/` shows; here it is a function that somebody else wrote.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pytest
import torch

import lora_fx.deltas
from lora_fx.deltas import ahead, one_pass, rematerialization
from lora_fx.deltas.fused_sum import FOLDS
from lora_fx.deltas.triton_route import BRANCHES

GPU = torch.device("cuda", 0)
MODULES = {"branches": "gpu_kernels", "folds": "fold_kernels"}


@pytest.fixture(params=[BRANCHES, FOLDS], ids=lambda route: route.what)
def route(request, monkeypatch):
    """One that has not been asked yet, on a machine with a new GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return replace(request.param, decided={})


def test_a_device_is_asked_once(route):
    asked = []
    route = replace(route, prove=asked.append)
    assert route.runs_on(GPU) and route.runs_on(GPU) and asked == [GPU]
    assert route.runs_on(torch.device("cuda", 1)) and len(asked) == 2


def test_on_a_cpu_nobody_asks(route):
    route = replace(route, prove=None)
    assert not route.runs_on(torch.device("cpu"))


def test_where_something_else_comes_out_torch_computes_and_that_is_said_once(route):
    asked = []

    def other(device: torch.device) -> None:
        asked.append(device)
        raise ArithmeticError("other bits\nand how that came")

    route = replace(route, prove=other)
    with pytest.warns(UserWarning) as said:
        assert not route.runs_on(GPU) and not route.runs_on(GPU)
    (text,) = [str(warning.message) for warning in said]
    assert asked == [GPU] and f"{route.what} on cuda:0 with torch's ops" in text
    assert text.endswith("not Triton's: ArithmeticError: other bits")


def test_a_triton_that_does_not_import_is_said_once(route, monkeypatch):
    name = MODULES[route.what]
    monkeypatch.setitem(sys.modules, f"lora_fx.deltas.{name}", None)
    monkeypatch.delattr(lora_fx.deltas, name, raising=False)
    with pytest.warns(UserWarning, match=f"{route.what} on cuda:0 .* not Triton's: ModuleNotFoundError") as said:
        assert not route.runs_on(GPU) and not route.runs_on(GPU)
    assert len(said) == 1


def test_a_device_without_memory_for_the_comparison_is_asked_again(route):
    found: list[Exception | None] = [torch.OutOfMemoryError("CUDA out of memory"), None]

    def full(device: torch.device) -> None:
        error = found.pop(0)
        if error:
            raise error

    route = replace(route, prove=full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not route.runs_on(GPU) and route.runs_on(GPU) and not found


def test_kernels_that_fail_later_are_not_asked_again(route):
    route = replace(route, prove=lambda device: None)
    assert route.runs_on(GPU)
    with pytest.warns(UserWarning, match="RuntimeError: no such card"):
        route.refuse(GPU, RuntimeError("no such card"))
    assert not route.runs_on(GPU)


@pytest.mark.parametrize("why", ["old", "of another maker"])
def test_products_of_branches_are_for_new_gpus_of_nvidia(route, why, monkeypatch):
    if why == "old":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    else:
        monkeypatch.setattr(torch.version, "hip", "6.0")
    asked = []
    assert replace(route, prove=asked.append).runs_on(GPU) is (route.what == "folds")
    assert asked == [GPU] * (route.what == "folds")


def test_what_they_are_for():
    assert BRANCHES.knows(torch.bfloat16, 2**23) and FOLDS.knows(torch.float32, 1)
    assert not BRANCHES.knows(torch.bfloat16, 2**23 - 1) and not BRANCHES.knows(torch.float32, 2**23)
    assert not FOLDS.knows(torch.float32, 0) and not FOLDS.knows(torch.float32, 2**31)
    assert not FOLDS.knows(torch.float64, 1), "factors may be float64, weights may not"


def test_all_who_compute_ask_the_same():
    assert one_pass.BRANCHES is rematerialization.BRANCHES is BRANCHES and ahead.FOLDS is FOLDS
    assert BRANCHES.decided is not FOLDS.decided
