"""Below `torch.compile`: what code of ours says to Dynamo, and what it makes of that.

The models dispatch: their own Python runs, and reads an adapted weight.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare, noise_floors, normalize_inputs, output_tensors, run
from lora_fx.graph import dynamo
from tests import reference


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Using(nn.Module):
    """One weight, which the function reads."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape) / 2), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.weight, x)


def adapted(base: nn.Module, kind: str, x: torch.Tensor) -> nn.Module:
    rank = {} if kind == "full" else {"rank": 2, "alpha": 3}
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", kind=kind, **rank), x)
    reference.fill(model)
    return model


def dense(model: nn.Module, base: nn.Module) -> nn.Module:
    """The base with W + δ in it."""
    twin = copy.deepcopy(base)
    for name, value in reference.dense_weights(model).items():
        twin.get_parameter(name).data.copy_(value)
    return twin


def assert_compiled_is_dense(model: nn.Module, base: nn.Module, x: torch.Tensor, **options: Any) -> None:
    """In its outputs; and in its gradients as the model itself is, which other tests hold against the dense sum."""
    twin, found = dense(model, base), output_tensors(torch.compile(model, **options)(x))
    inputs = normalize_inputs(twin, x)
    outputs = run(twin, inputs)
    for y, own, (exact, noise) in zip(outputs, found, noise_floors(twin, inputs, outputs), strict=True):
        assert compare(y, own.detach(), exact, noise, y.dtype)
    wide = copy.deepcopy(model).double()
    each = gradients(model, found), gradients(model, model(x)), gradients(wide, wide(x.double()))
    for own, eager, exact in zip(*each, strict=True):
        noise = float((eager - exact).norm() / exact.norm())
        assert compare(own, eager, exact, noise, own.dtype)


def gradients(model: nn.Module, outputs: Any) -> tuple[torch.Tensor, ...]:
    loss = sum(t.square().sum() for t in output_tensors(outputs))
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def on_both_sides(w: Any, x: torch.Tensor) -> torch.Tensor:
    """Whole, turned and in part."""
    return w @ x + 2 * (w.t() @ x) - 3 * (w[1] @ x) + 4 * (x @ w) + w.matmul(x) / 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_square_weight_stays_on_its_side(kind):
    x, base = torch.randn(5, 5), Using((5, 5), on_both_sides)
    assert_compiled_is_dense(adapted(base, kind, x), base, x, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("missing", [AttributeError, ImportError])
def test_a_torch_without_the_table_keeps_its_own_way(monkeypatch, missing):
    def gone(name: str) -> Any:
        raise missing

    assert dynamo.reverse_matmul()
    monkeypatch.setattr(dynamo.importlib, "import_module", gone)
    assert not dynamo.reverse_matmul()


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "conv1d": ((6, 4, 3), lambda w, x: F.conv1d(x, w, padding=1)),
    "conv_transpose1d": ((4, 6, 3), lambda w, x: F.conv_transpose1d(x, w, stride=2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_that_dispatches_is_one_graph(name):
    x, base = torch.randn(2, 4, 9), Using(*CONVOLUTIONS[name])
    assert_compiled_is_dense(adapted(base, "dora", x), base, x, backend="aot_eager", fullgraph=True)


# ── what Dynamo does not trace ───────────────────────────────────────────────────────────────────────────────────────


class Locked(nn.Module):
    """Dynamo runs its forward as Python."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.own = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            for layer in self.layers:
                x = torch.relu(layer(x)) + F.linear(x, self.own)
            return x

    def __deepcopy__(self, memo: dict) -> Locked:
        twin = Locked()
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_runs_as_python_compiles_nothing_for_each_weight():
    x, base, counts = torch.randn(3, 8), Locked(), []
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", kind="dora", rank=2), x)
    for one in (base, model):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        assert torch.equal(torch.compile(one, backend=counter)(x), one(x))
        counts.append(counter.frame_count)
    assert counts == [0, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_runs_as_torch_runs_it(make):
    x, base = torch.randn(2, 6, 4), make(4, 7, batch_first=True)
    assert_compiled_is_dense(adapted(base, "lora", x), base, x, backend="aot_eager")
