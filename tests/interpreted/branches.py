"""Triton's kernels for branches: the same function of x, A and B, its gradients, and its dropout.

What they are on a GPU, `tests/test_gpu.py` sees.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_fx.deltas import gpu_kernels as kernels_of_gpu
from lora_fx.deltas import kernels, one_pass, rematerialization, schedules
from lora_fx.deltas.kernels import Term
from lora_fx.deltas.triton_route import BRANCHES
from lora_fx.errors import LoraFxError

HALF = torch.float16  # what the interpreter multiplies
SEED = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module", autouse=True)
def gpu_kernels():
    """With blocks that need several for the smallest sizes."""
    context = pytest.MonkeyPatch()
    context.setattr(kernels_of_gpu, "PASS", kernels_of_gpu.Blocks(16, 16, 32, 4, 1))
    context.setattr(kernels_of_gpu, "WRITE", kernels_of_gpu.Blocks(16, 32, 0, 4, 1))
    yield kernels_of_gpu
    context.undo()


@pytest.fixture(autouse=True)
def _seeds(monkeypatch):
    """CPUs have generators of another kind."""
    monkeypatch.setattr(one_pass, "_seed", lambda device: int(torch.randint(2**62, ())))


def route(monkeypatch, least: int) -> None:
    """Calls of tensors of so many elements on a CPU are for the kernels, too."""
    here = replace(BRANCHES, sizes=range(least, 2**63), decided={torch.device("cpu"): True})
    for module in (one_pass, rematerialization):
        monkeypatch.setattr(module, "BRANCHES", here)


def site(op: str, rank: int = 3, part: bool = False, factors: torch.dtype = torch.float32, n: int = 2):
    """x, W, its bias, and terms of odd sizes; a part of W has a branch."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 37).to(HALF).requires_grad_()
    weight = (torch.randn(45, 37) / 6).to(HALF)
    bias = torch.randn(45).to(HALF) if op in ("linear", "addmm") else None
    out, first = (20, 11) if part else (45, 0)
    terms = [
        (
            (torch.randn(rank, 37) / 6).to(factors).requires_grad_(),
            (torch.randn(out, rank) / 2).to(factors).requires_grad_(),
            0.5 + k,
            first,
        )
        for k in range(n)
    ]
    if op != "linear":
        weight = weight.T.contiguous()
    if op in ("mm", "addmm"):
        x = x.detach().view(21, 37).requires_grad_()
    return x, weight, bias, terms


def exact(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: list, masks: list):
    """In float64, from the numbers as they are; where the kernels round a factor it is rounded."""
    wide = weight.double() if op == "linear" else weight.double().T
    y = F.linear(x, wide, None if bias is None else bias.double())
    for (A, B, scale, first), mask in zip(terms, masks, strict=True):
        own = x if mask is None else x * mask
        after = y.shape[-1] - first - len(B)
        y = y + scale * F.pad(own @ A.T @ B.T, (first, after))
    return y


def reach(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: list, masks: list):
    """The same of magnitudes: what rounding is a share of."""
    terms = [(A.abs(), B.abs(), abs(scale), first) for A, B, scale, first in terms]
    return exact(op, x.abs(), weight.abs(), None if bias is None else bias.abs(), terms, masks)


def doubles(x: torch.Tensor, terms: list) -> tuple[torch.Tensor, list]:
    """Leaves of float64 with the same numbers; factors rounded as the kernels read them."""
    wide = [
        (A.detach().to(HALF).double().requires_grad_(), B.detach().to(HALF).double().requires_grad_(), scale, first)
        for A, B, scale, first in terms
    ]
    return x.detach().double().requires_grad_(), wide


def with_dropout(x: torch.Tensor, terms: list, p: float | None) -> tuple[list[Term], list]:
    drops = [None if p is None else one_pass.Dropped.of(x, p) for _ in terms]
    rows = x.numel() // x.shape[-1]
    masks = [None if d is None else d.drop.kept(rows, x.shape[-1], x.device).view(x.shape) for d in drops]
    return [Term(*term, d) for term, d in zip(terms, drops, strict=True)], masks


# Each number is rounded to HALF at most five times on its way (A, B, x with dropout, z or h, itself), each time by a
# share of what it is made of, and sums are taken in float32.
STEPS = 5 * torch.finfo(HALF).eps / 2 + 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("op", ["linear", "matmul", "mm", "addmm"])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("p", [None, 0.25], ids=["plain", "dropout"])
def test_it_is_the_matmul_with_its_branches_and_the_gradients_of_that(op, part, p):
    x, weight, bias, plain = site(op, part=part)
    terms, masks = with_dropout(x, plain, p)
    y = one_pass.matmul(op, x, weight, bias, terms)
    wide_x, wide = doubles(x, plain)
    whole = exact(op, wide_x, weight, bias, wide, masks)
    most = reach(op, wide_x, weight, bias, wide, masks)
    assert y.dtype == HALF and y.shape == whole.shape
    assert bool(((y.double() - whole).abs() <= STEPS * most).all())
    grad = torch.randn(y.shape).to(HALF)
    leaves = [x, *(t for A, B, *_ in plain for t in (A, B))]
    found = torch.autograd.grad(y, leaves, grad)
    wide_leaves = [wide_x, *(t for A, B, *_ in wide for t in (A, B))]
    truth = torch.autograd.grad(whole, wide_leaves, grad.double())
    bounds = torch.autograd.grad(most, wide_leaves, grad.double().abs())
    for own, leaf, true, bound in zip(found, leaves, truth, bounds, strict=True):
        assert own.dtype == leaf.dtype and own.shape == leaf.shape and own.is_contiguous()
        assert bool(((own.double() - true).abs() <= STEPS * bound.abs()).all())


def test_with_b_zero_it_is_the_op_itself():
    x, weight, bias, plain = site("linear")
    terms, _ = with_dropout(x, [(A, torch.zeros_like(B), *rest) for A, B, *rest in plain], None)
    assert torch.equal(one_pass.matmul("linear", x, weight, bias, terms), F.linear(x, weight, bias))


def test_the_same_numbers_give_the_same_bits():
    x, weight, bias, plain = site("linear")

    def bits() -> list[torch.Tensor]:
        torch.manual_seed(3)
        y = one_pass.matmul("linear", x, weight, bias, with_dropout(x, plain, 0.25)[0])
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *(t for A, B, *_ in plain for t in (A, B))])]

    assert all(map(torch.equal, bits(), bits()))


@pytest.mark.parametrize("wanted", ["x", "A", "B"])
def test_only_what_is_asked_for_is_computed(wanted, gpu_kernels, monkeypatch):
    x, weight, bias, plain = site("linear", n=1)
    ((A, B, *_),) = plain
    for name, leaf in (("x", x), ("A", A), ("B", B)):
        leaf.requires_grad_(name == wanted)
    y = one_pass.matmul("linear", x, weight, bias, with_dropout(x, plain, None)[0])
    asked = []
    honest = gpu_kernels.passed, gpu_kernels.written
    monkeypatch.setattr(
        gpu_kernels,
        "passed",
        lambda p, q=None, z=None, *a, **k: asked.append((q is not None, z is not None)) or honest[0](p, q, z, *a, **k),
    )
    monkeypatch.setattr(gpu_kernels, "written", lambda *a, **k: asked.append("dx") or honest[1](*a, **k))
    leaf = {"x": x, "A": A, "B": B}[wanted]
    (found,) = torch.autograd.grad(y.float().sum(), leaf)
    assert found.shape == leaf.shape
    expected = {"x": [(True, False), "dx"], "A": [(True, False), (False, True)], "B": [(False, True)]}
    assert asked == expected[wanted]


@pytest.mark.parametrize("p", [None, 0.25], ids=["plain", "dropout"])
def test_second_derivatives_are_those_of_the_branch(p):
    x, weight, bias, plain = site("linear", n=1)
    terms, masks = with_dropout(x, plain, p)
    wide_x, wide = doubles(x, plain)
    (A, B, *_), (wide_a, wide_b, *_) = plain[0], wide[0]

    def twice(y, x, A, B):
        first = torch.autograd.grad(y.double().square().sum(), [x, A, B], create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in first), [x, A, B])

    found = twice(one_pass.matmul("linear", x, weight, bias, terms), x, A, B)
    truth = twice(exact("linear", wide_x, weight, bias, wide, masks), wide_x, wide_a, wide_b)
    for own, true in zip(found, truth, strict=True):  # a polynomial of low degree: some steps of the dtype in all
        assert float((own.double() - true).norm() / true.norm()) <= 16 * STEPS


def test_what_reads_a_dropped_input_otherwise_gets_the_tensor(gpu_kernels):
    x = torch.randn(4, 6, 8).to(HALF).requires_grad_()
    lazy = one_pass.Dropped.of(x, 0.25)
    mask = lazy.drop.kept(24, 8, x.device).view(x.shape)
    wide = (x.detach().float() * mask.float()).to(HALF)
    assert torch.equal(F.linear(lazy, torch.eye(8).to(HALF)), wide) and torch.equal(lazy + 0, wide)
    assert lazy.requires_grad and lazy.shape == x.shape
    (grad,) = torch.autograd.grad((lazy * 3).sum(), x)
    assert torch.equal(grad, (3 * mask).to(HALF))
    ((made, *_),) = [term[4:] for term in one_pass.made([(None, None, 1.0, 0, lazy)])]
    assert type(made) is torch.Tensor and torch.equal(made, wide)


def test_an_input_that_was_written_to_after_its_dropout_is_refused(monkeypatch):
    route(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, weight, _, plain = site("linear", n=1)
    x = x.detach()
    terms, _ = with_dropout(x, plain, 0.5)
    assert one_pass.takes(x, weight, terms)
    x.add_(1)
    assert not one_pass.takes(x, weight, terms)
    with pytest.raises(LoraFxError, match="was written to between its dropout"):
        one_pass.made(terms)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_so_much_is_dropped_wherever_one_looks(gpu_kernels, p):
    """Of rows, of columns, of pairs of neighbours, and of two seeds beside each other: within eight deviations."""
    rows, columns = 512, 1024
    kept = torch.stack([gpu_kernels.Drop(SEED + k, p).kept(rows, columns, torch.device("cpu")) for k in (0, 1)]) > 0

    def fair(share: torch.Tensor, draws: int, chance: float = 1 - p) -> bool:
        return bool(((share - chance).abs() <= 8 * math.sqrt(chance * (1 - chance) / draws)).all())

    share = kept.double()
    assert fair(share.mean(), kept.numel()) and fair(share.mean(1), rows) and fair(share.mean(2), columns)
    both, half = (1 - p) ** 2, kept.numel() / 2
    for near in (kept[0] & kept[1], kept[:, 1:] & kept[:, :-1], kept[..., 1:] & kept[..., :-1]):
        assert fair(near.double().mean(), int(half), both)


def test_a_checkpoint_drops_the_same_again(monkeypatch):
    x, weight, bias, plain = site("linear", n=1)
    leaves = [x, *plain[0][:2]]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return one_pass.matmul("linear", x, weight, bias, with_dropout(x, plain, 0.5)[0])

    found = []
    for again in (False, True):
        torch.manual_seed(0)
        y = checkpoint(forward, x, use_reentrant=False) if again else forward(x)
        found.append(torch.autograd.grad(y.float().square().sum(), leaves))
    assert all(map(torch.equal, *found))


def test_nothing_of_dropout_is_kept_but_a_seed():
    x, weight, bias, plain = site("linear", n=1)
    y = one_pass.matmul("linear", x, weight, bias, with_dropout(x, plain, 0.5)[0])
    (A, B, *_), saved = plain[0], y.grad_fn.saved_tensors
    places = {t.untyped_storage().data_ptr() for t in (x, weight, A, B)}
    (z,) = [t for t in saved if t.untyped_storage().data_ptr() not in places]
    assert z.shape == (3, 21) and z.dtype == torch.float32


class Norm(torch.nn.Module):
    """Llama's, around a matmul."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.scale, self.first = torch.nn.Parameter(torch.randn(37).to(HALF), requires_grad=False), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        own = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.scale * own if self.first else own * self.scale


@pytest.mark.parametrize("first", [True, False])
def test_a_norm_is_made_again_in_one_pass_to_the_same_bits(first, gpu_kernels, monkeypatch):
    route(monkeypatch, 1)
    x, weight, bias, plain = site("linear", n=1)
    norm, asked, honest = Norm(first), [], gpu_kernels.multiplied
    monkeypatch.setattr(gpu_kernels, "multiplied", lambda *args: asked.append(1) or honest(*args))
    h = norm(x)
    recipe = rematerialization.recipe(h, plain[0][0])
    with torch.no_grad():
        assert torch.equal(recipe.again(recipe.operands), h) and asked == [1]
    y = one_pass.matmul("linear", h, weight, bias, with_dropout(h, plain, None)[0])
    found = torch.autograd.grad(y.float().square().sum(), [x, *plain[0][:2]], retain_graph=True)
    assert asked == [1, 1]
    monkeypatch.setattr(rematerialization, "_in_one_pass", lambda *args: None)
    assert all(map(torch.equal, found, torch.autograd.grad(y.float().square().sum(), [x, *plain[0][:2]])))


def test_kernels_that_compute_something_else_are_not_used(gpu_kernels, monkeypatch):
    gpu_kernels.prove(torch.device("cpu"))
    monkeypatch.setattr(gpu_kernels.Drop, "kept", lambda *args: torch.ones(()))
    with pytest.raises(ArithmeticError, match="kernel 2 is off by"):
        gpu_kernels.prove(torch.device("cpu"))


def test_what_it_takes(monkeypatch):
    route(monkeypatch, 21 * 45)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, weight, _, plain = site("linear")
    terms, _ = with_dropout(x, plain, 0.5)
    assert one_pass.takes(x, weight, terms)
    other = one_pass.Dropped.of(x + 1, 0.5)
    for bad in (
        (x.float(), weight.float(), terms),
        (x[:1], weight, with_dropout(x[:1], plain, 0.5)[0]),  # too small
        (x, weight[None], terms),
        (x, weight, [(*terms[0][:4], F.dropout(x, 0.5))]),  # somebody's own
        (x, weight, [(*terms[0][:4], other)]),  # of something else
        (x, weight, [(terms[0][0].double(), terms[0][1].double(), *terms[0][2:])]),
        (x, weight, [(torch.randn(65, 37), torch.randn(45, 65), *terms[0][2:])]),
        (x, weight, [(torch.randn(0, 37), torch.randn(45, 0), *terms[0][2:])]),
        (x[..., :0], weight[:, :0], [(torch.randn(3, 0), *terms[0][1:4], None)]),
    ):
        assert not one_pass.takes(*bad)


def test_a_call_that_is_none_for_the_kernels_has_the_tensor(monkeypatch):
    """`schedules.matmul` on a device that has them, of a call they do not take."""
    x, weight, bias, plain = site("linear", n=1)
    terms, masks = with_dropout(x, plain, 0.25)
    found = schedules.matmul("linear", x, weight, bias, one_pass.made(terms), "fused")
    wide_x, wide = doubles(x, plain)
    most = STEPS * reach("linear", wide_x, weight, bias, wide, masks)
    assert bool(((found.double() - exact("linear", wide_x, weight, bias, wide, masks)).abs() <= most).all())
    assert bool((kernels.branch("linear", x, weight, bias, terms) - found).double().abs().le(2 * most).all())
