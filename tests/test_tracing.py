"""What a traced forward may bake in, whose code is watched for that, and what generated code needs to run."""

from __future__ import annotations

import cProfile
import os
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule, changes
from lora_fx.passes import purity


class Annotated(nn.Module):
    """This file postpones annotations: fx keeps them as strings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def test_a_forward_with_postponed_annotations_is_rewritten():
    model, x = Annotated(), torch.randn(4, 5)
    before = model(x)
    lora_fx.apply(model, Rule(where="*", rank=2), x)
    assert model.weight_lora_default.realised == "graph"
    assert torch.equal(model(x), before)


STANDARD, TORCH = os.path.dirname(os.__file__), os.path.dirname(torch.__file__)
SITE = os.path.join(STANDARD, "site-packages")


@pytest.mark.parametrize(
    ("file", "watched"),
    [
        (os.path.join(SITE, "transformers", "models", "llama", "modeling_llama.py"), True),
        (os.path.join("anywhere", "model.py"), True),
        (os.path.join(TORCH, "nn", "modules", "transformer.py"), True),
        (os.path.join(TORCH, "nn", "modules", "module.py"), False),
        (os.path.join(TORCH, "functional.py"), False),
        (os.path.join(STANDARD, "contextlib.py"), False),
        ("<string>", True),  # written by a dataclass, or in a notebook,
        ("<lora_fx Linear 1f>", True),
    ],
)
def test_whose_code_is_watched_for_decisions(file, watched):
    assert purity.is_model_file(file) is watched


def test_our_own_code_is_not_watched_wherever_it_is_installed(monkeypatch):
    """Installed from a wheel it lies in site-packages, as models do: then every module would have dispatched."""
    assert all(map(os.path.isdir, purity._OWN))
    own = tuple(os.path.join(SITE, "lora_fx", os.path.basename(room[:-1]), "") for room in purity._OWN)
    monkeypatch.setattr(purity, "_OWN", own)
    purity.is_model_file.cache_clear()
    assert not any(purity.is_model_file(os.path.join(room, "some.py")) for room in own)


def test_a_weight_that_is_also_read_whole_is_adapted_in_both_reads():
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return F.linear(x, self.weight) * (1 + self.weight.square().mean())

    model, x = Penalised(), torch.randn(4, 5)
    lora_fx.apply(model, Rule(where="*", rank=2), x)
    certificate = lora_fx.certify(model, x)
    assert certificate, str(certificate)
    assert {row.realised for row in certificate.rows} == {"dispatch", "dense"}


# ── beside profilers, debuggers and coverage ─────────────────────────────────────────────────────────────────────────


def nothing(*_: Any) -> None:
    """A tracer or a profiler that is a Python function."""


PROFILERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no profiler": nullcontext,
    "one in C": cProfile.Profile,
    "one in Python": lambda: changes.PROFILER.set_for_now(nothing),
}


@pytest.mark.parametrize("profiler", PROFILERS)
@pytest.mark.parametrize("tracer", [None, nothing], ids=["no tracer", "a tracer"])
def test_calls_are_seen_beside_tracers_and_profilers_which_are_back_afterwards(tracer, profiler):
    def called() -> None:
        pass

    def generator():
        yield

    def raises() -> None:
        raise ValueError

    seen: list[tuple[types.CodeType, str]] = []
    with changes.TRACER.set_for_now(tracer), PROFILERS[profiler]():
        tools = sys.gettrace(), sys.getprofile()
        with changes.calls_seen_by(lambda frame: seen.append(frame.f_code)):
            called()
            list(generator())
            len(seen)
            with suppress(ValueError):
                raises()
        assert (sys.gettrace(), sys.getprofile()) == tools
        after = len(seen)
        called()
    assert len(seen) == after
    for function, times in ((called, 1), (generator, 2), (raises, 1)):
        assert seen.count(function.__code__) == times


def test_a_profiler_in_c_goes_on_after_the_calls_were_seen():
    def called() -> None:
        pass

    profiler = cProfile.Profile()
    with profiler:
        with changes.calls_seen_by(nothing):
            called()
        called()
    counted = [entry.callcount for entry in profiler.getstats() if entry.code is called.__code__]
    assert counted == [2]


@pytest.mark.parametrize("profiler", PROFILERS)
def test_a_profiler_may_run_around_a_verb(profiler):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.GELU()), torch.randn(5, 4)
    with PROFILERS[profiler]():
        lora_fx.apply(model, Rule(where="*", rank=2), x)
        after = model(x)
    assert model[0].weight_lora_default.realised == "graph" and torch.equal(model(x), after)
