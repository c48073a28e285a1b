"""A product that autograd keeps the operands of is not kept by the branch, and its gradients are the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import dropping, rematerialization, schedules
from tests import reference


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(schedules, "_LARGE", 0)


class Block(nn.Module):
    """What Llama does with activations: a norm with a weight and casts, a gate, a residual."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        h = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def adapted(
    schedule: str = "fused", dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, dtype=dtype)
    rule = Rule(where="*", rank=2, schedule=schedule, dropout=dropout)
    model = lora_fx.apply(Block().to(dtype), rule, x, check=False)
    reference.fill(model)
    return model.train(), x.requires_grad_()


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(model(x).square().sum(), [x, *trained(model)])


def kept(tensor: torch.Tensor) -> dict[int, int]:
    """Storages that the graph of a tensor keeps, and their bytes."""

    def tensors(node: torch.autograd.graph.Node) -> Iterator[torch.Tensor]:
        if hasattr(node, "saved_tensors"):
            yield from (t for t in node.saved_tensors if t is not None)
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor):
                yield value

    found, nodes, seen = {}, [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(node)}
    return found


def test_a_norm_and_a_gate_are_not_kept_a_second_time():
    def beyond_the_base(schedule: str) -> int:
        model, x = adapted(schedule)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        total = sum(size for place, size in kept(model(x)).items() if place not in own)
        lora_fx.deactivate(model)
        return total - sum(size for place, size in kept(model(x)).items() if place not in own)

    tokens, size = 2 * 3, 8
    products = tokens * (16 + 24) * size
    down = 3 * tokens * 2 * size  # x·Aᵀ of the three sites, of rank 2
    assert beyond_the_base("branch") >= products + down
    assert beyond_the_base("fused") == down


@pytest.mark.parametrize(("schedule", "dropout"), [("fused", 0.0), ("fused", 0.5), ("dense", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_the_bits_they_were(monkeypatch, schedule, dropout, dtype):
    model, x = adapted(schedule, dropout, dtype)
    found = gradients(model, x)
    made = []
    honest = rematerialization.recipe
    monkeypatch.setattr(rematerialization, "recipe", lambda *args: made.append(honest(*args)))
    for a, b in zip(found, gradients(model, x), strict=True):
        assert torch.equal(a, b)
    assert any(recipe is not None for recipe in made)


@pytest.fixture
def native(monkeypatch):
    """Dropout as torch takes it on a GPU: one op, which keeps its mask."""
    monkeypatch.setattr(dropping, "_draws", lambda x: False)
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0])


def test_of_dropout_on_a_gpu_its_mask_is_kept_and_nothing_else(native):
    model, x = adapted("fused", 0.25)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = sorted(size for place, size in kept(model(x)).items() if place not in own)
    lora_fx.deactivate(model)
    base = sorted(size for place, size in kept(model(x)).items() if place not in own)
    masks, down = [6 * width for width in (16, 16, 24)], [6 * 2 * 8] * 3  # bytes: of the sites' inputs; x·Aᵀ, of rank 2
    assert sorted([*base, *masks, *down]) == sizes


def test_what_dropout_on_a_gpu_made_is_made_again(native, monkeypatch):
    model, x = adapted("fused", 0.25)
    found = gradients(model, x)
    monkeypatch.setattr(rematerialization, "_masked", lambda *args: None)
    for a, b in zip(found, gradients(model, x), strict=True):
        assert torch.equal(a, b)
    _, *factors = found
    assert all(bool(factor.any()) for factor in factors)


def test_second_derivatives_reach_through_the_dropout_of_a_gpu(native):
    model, x = adapted("fused", 0.25)

    def function(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return model(x)

    reads = (x, *trained(model)[:2])
    assert torch.autograd.gradcheck(function, reads)
    assert torch.autograd.gradgradcheck(function, reads)


@pytest.mark.parametrize("schedule", ["fused", "dense"])
def test_second_derivatives_reach_through_the_product(schedule):
    model, x = adapted(schedule)
    reads = trained(model)[:2]

    def function(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return model(x)

    assert torch.autograd.gradcheck(function, (x, *reads))
    assert torch.autograd.gradgradcheck(function, (x, *reads))


def test_the_product_is_made_once_for_all_that_read_it_and_then_let_go(monkeypatch):
    model, x = adapted()
    recipes, made = [], []
    honest = rematerialization.recipe

    def counted(*args: torch.Tensor | None) -> rematerialization.Recipe | None:
        found = honest(*args)
        if found is not None:
            again = found.make
            object.__setattr__(found, "make", lambda kept: made.append(1) or again(kept))
            recipes.append(found)
        return found

    monkeypatch.setattr(rematerialization, "recipe", counted)
    loss = model(x).sum()
    for times in 1, 2:  # a graph that is kept can be gone through again
        loss.backward(retain_graph=True)
        assert len(recipes) == 3 and len(made) == 2 * times  # the norm for gate and up, the gated product for down
        assert all(recipe.shared.value is None for recipe in recipes)


def test_a_user_that_takes_no_part_in_backward_changes_nothing():
    model, x = adapted()
    h = x * x.exp()
    unused, used = model.gate(h), model.up(h)
    (first,) = torch.autograd.grad(used.sum(), [model.up.weight_lora_default.A], retain_graph=True)
    (again,) = torch.autograd.grad(used.sum(), [model.up.weight_lora_default.A])
    assert torch.equal(first, again) and unused.requires_grad


def test_an_operand_that_was_written_to_is_an_error_as_everywhere_in_autograd():
    model, x = adapted()
    a = x * 2
    y = model.up(a * a.exp())
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Written(nn.Module):
    """Its product is written to while nobody looks: the node stays that of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * x.sin()
        with torch.no_grad():
            y.clamp_(min=0.1)
        return self.linear(y)


def test_a_product_that_was_written_to_is_kept_as_it_is(monkeypatch):
    monkeypatch.setattr(rematerialization, "_is_still", lambda *args: True)  # as on a GPU: its version says so
    found = []
    for schedule in ("fused", "branch"):
        torch.manual_seed(0)
        x = torch.randn(5, 16, dtype=torch.float64)
        model = lora_fx.apply(Written().double(), Rule(where="*", rank=2, schedule=schedule), x)
        reference.fill(model)
        y = model(x.requires_grad_())
        found.append(torch.autograd.grad(y, trained(model), torch.ones_like(y)))
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= 16 * torch.finfo(plain.dtype).eps * plain.norm()


def _written_data(x: torch.Tensor) -> torch.Tensor:
    y = x * x.sin()
    y.data.clamp_(min=0.1)
    return y


def _written_inside(x: torch.Tensor) -> torch.Tensor:
    y = x * x.sin()
    with torch.no_grad():
        y.clamp_(min=0.1)
    return y * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("written", [_written_data, _written_inside])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_product_that_was_written_to_unseen_is_kept_as_it_is(written, dropout):
    def gradient(schedule: str) -> torch.Tensor:
        torch.manual_seed(0)
        x = torch.randn(5, 16, dtype=torch.float64)
        rule = Rule(where="*", rank=2, schedule=schedule, dropout=dropout)
        model = lora_fx.apply(nn.Linear(16, 4).double(), rule, x)
        reference.fill(model)
        torch.manual_seed(1)
        model(written(x.requires_grad_())).sum().backward()
        return model.weight_lora_default.A.grad

    ours, plain = gradient("fused"), gradient("branch")
    assert (ours - plain).norm() <= 16 * torch.finfo(plain.dtype).eps * plain.norm()


def test_a_device_that_has_to_be_waited_for_is_asked_once_for_each_reader(monkeypatch):
    monkeypatch.setattr(rematerialization, "_is_at_hand", lambda device: False)
    asked, honest = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda *args: asked.append(1) or honest(*args))
    model, x = adapted()
    for written in (False, True, False):
        sites = [copy.deepcopy(model.up) for _ in range(2)]
        for again in range(3):
            for site in sites:
                y = x * x.exp()
                if written:
                    y.data.clamp_(min=0.5)
                found = torch.autograd.grad(site(y).sum(), trained(site))
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(rematerialization, "recipe", lambda *args: None)
                    kept = torch.autograd.grad(site(y).sum(), trained(site))
                assert all(map(honest, found, kept))
            assert len(asked) == 2, again
        asked.clear()


def test_where_saved_tensors_are_packed_nothing_is_made_again():
    model, x = adapted()
    expected = gradients(model, x)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        assert rematerialization.recipe(x * x.exp(), model.up.weight_lora_default.A) is None
        loss = model(x).square().sum()
    assert all(map(torch.equal, expected, torch.autograd.grad(loss, [x, *trained(model)])))
    assert packed
    for reentrant in False, True:
        for p in (x, *trained(model)):
            p.grad = None
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(expected, (x, *trained(model)), strict=True))


def test_what_is_no_product_is_kept():
    x = torch.randn(3, 4, requires_grad=True)
    for other in (x, x.detach(), x.exp(), x + 1, F.layer_norm(x, (4,)), x * 2.0):
        assert rematerialization.recipe(other, x) is None
    product = (x * x.exp()).view(2, 6)
    recipe = rematerialization.recipe(product, x)
    assert recipe is not None and torch.equal(recipe.again(recipe.operands), product)
