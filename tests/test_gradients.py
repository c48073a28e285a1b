"""θ gets its gradient wherever W + δ gets one in the model itself; who reads the weight as a plain tensor is served."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import Rule
from lora_fx.checks.gradients import _InFloat32
from lora_fx.checks.verification import compare
from lora_fx.errors import EquivalenceError
from lora_fx.graph.program import capture
from lora_fx.model.inventory import inventory
from tests import reference
from tests.stateful.functions import Multiply

RULE = Rule(where="*", rank=2)


class _Doubled(torch.autograd.Function):
    """A function of x alone."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Hands(nn.Module):
    """Hands its weight to an autograd function."""

    def __init__(self, rows: int = 4, columns: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x):
        return Multiply.apply(x, self.weight)


class Kernel(Hands):
    """Hands it to what takes plain tensors alone, as code in C++ does."""

    def forward(self, x):
        if not isinstance(self.weight, torch.Tensor):
            raise TypeError("argument 'weight' must be Tensor")
        return x @ self.weight.mT


class Chain(nn.Module):
    """The second of the functions gets an x that asks for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain, self.last = Hands(4, 6), nn.Linear(4, 5), Hands(3, 5)

    def forward(self, x):
        return self.last(_Doubled.apply(self.plain(self.first(x))).tanh())


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().double()


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sums(base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """W + s·B·A, differentiable in A and B."""
    plain = dict(base.named_parameters())
    found = {}
    for storage in inventory(model).storages():
        (adapter,) = storage.adapters
        for name in storage.names:
            found[name] = plain[name].detach() + adapter.alpha / adapter.rank * adapter.B @ adapter.A
    return found


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    theta = [p for storage in inventory(model).storages() for a in storage.adapters for p in (a.A, a.B)]
    return list(torch.autograd.grad(loss, theta))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the order in which three products of at most seven terms are added up."""
    return bool((a - b).norm() <= 3 * 7 * torch.finfo(a.dtype).eps * b.norm())


@pytest.mark.parametrize("kind", [Hands, Kernel, Chain])
def test_who_wants_a_plain_tensor_gets_the_sum_and_theta_its_gradient(kind):
    base = made(kind)
    model = lora_fx.apply(copy.deepcopy(base), RULE, X)
    reference.fill(model)
    got = model(X)
    expected = torch.func.functional_call(base, sums(base, model), (X,))
    assert same(got, expected)
    pairs = zip(*(gradients(model, y.square().sum()) for y in (got, expected)), strict=True)
    for mine, theirs in pairs:
        assert bool(mine.any()) and same(mine, theirs)
    certificate = lora_fx.certify(model, X)
    assert certificate and not certificate.gradient_free and "dense" in {row.realised for row in certificate.rows}
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), got)
    assert torch.equal(lora_fx.unfold(lora_fx.fold(model))(X), got)


def test_only_they_are_read_so():
    model = lora_fx.apply(made(Chain), RULE, X)
    ways = {s.names[0]: str(s.adapters[0].realised) for s in inventory(model).storages()}
    assert ways == {"first.weight": "dense", "plain.weight": "graph", "last.weight": "dense"}
    assert "self.weight is the sum with weight_lora_default" in lora_fx.show(model.first)
    lora_fx.apply(model, Rule(where="first", rank=1), X, name="more")
    assert [str(a.realised) for a in inventory(model).by_weight()["first.weight"]] == ["dense", "dense"]


def test_a_dropout_has_no_branch_there_and_is_refused():
    model = made(Chain)
    before = reference.bits(model)
    with pytest.raises(EquivalenceError, match=r"first\.weight.*does not train as the model with W \+ δ") as caught:
        lora_fx.apply(model, Rule(where="first", rank=2, dropout=0.1), X)
    assert "exclude that weight" in caught.value.remedy
    assert reference.same_bits(before, reference.bits(model)) and not lora_fx.adapters(model)


def test_a_model_whose_gradient_is_lost_is_not_certified():
    model = lora_fx.apply(made(Hands), RULE, X, check=False)  # nobody has looked
    certificate = lora_fx.certify(model, X)
    assert all(row.covered for row in certificate.rows) and all(certificate.whole)
    assert certificate.gradient_lost == certificate.gradient_free == ("weight (default)",) and not certificate
    assert "in the base model one reaches the weight of weight (default)" in str(certificate)


class Gated(nn.Module):
    """A row of the weight never matters, and one attention score of one token has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.frozen = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        query, key = self.qk(x).chunk(2, -1)
        weights = (query * key).sum(-1, keepdim=True).softmax(-1)
        return weights * key + self.frozen(x).detach().sum()


def test_what_has_no_gradient_in_the_model_itself_is_not_lost():
    model = lora_fx.apply(made(Gated), [Rule(where="qk", role="*", rank=2), Rule(where="frozen", rank=2)], X)
    certificate = lora_fx.certify(model, X)
    assert certificate and certificate.gradient_free == ("frozen.weight (default)",) and not certificate.gradient_lost


def test_what_does_not_train_is_not_asked_about():
    model = lora_fx.apply(made(Hands), RULE, X, check=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    certificate = lora_fx.certify(model, X)
    assert certificate and not certificate.gradient_free


class Unable(nn.Module):
    """Backward raises, with and without adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        y = self.linear(x).exp()
        z = y * 2
        with torch.no_grad():
            y.add_(1)
        return z + y.sigmoid_()


def test_a_model_that_has_no_backward_itself_is_not_refused_and_the_certificate_says_so():
    with pytest.raises(RuntimeError):
        made(Unable)(X).sum().backward()
    model = lora_fx.apply(made(Unable), RULE, X)
    certificate = lora_fx.certify(model, X)
    assert certificate and not certificate.gradient_free
    assert any("Backward does not run" in note for note in certificate.notes)


class Table(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=2 if how == "module" else None)
        self.how = (how,)

    def forward(self, ids):
        if self.how[0] == "counted from the end":
            return F.embedding(ids, self.table.weight, -7).tanh()
        if self.how[0] == "by name":
            return F.embedding(ids, padding_idx=2, weight=self.table.weight).tanh()
        return self.table(ids).tanh()


IDS = torch.tensor([[1, 2, 5], [2, 8, 0]])


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("how", ["module", "by name", "counted from the end"])
def test_padding_trains_nothing(how, kind):
    torch.manual_seed(0)
    base = Table(how).double()
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="table", rank=2, kind=kind), IDS)
    reference.fill(model)
    (storage,) = inventory(model).storages()
    (adapter,) = storage.adapters
    theta = list(adapter.parameters())
    dense = {"table.weight": base.table.weight.detach() + adapter.delta(base.table.weight.detach())}
    got, expected = model(IDS), torch.func.functional_call(base, dense, (IDS,))
    assert same(got, expected) and not same(got, base(IDS))
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for mine, theirs in zip(*(torch.autograd.grad(y, theta, cotangent) for y in (got, expected)), strict=True):
        assert bool(mine.any()) and same(mine, theirs)
    with torch.no_grad():
        assert "where" not in str(capture(model, (IDS,)).capture.graph)
    assert lora_fx.certify(model, IDS)


def test_an_output_of_padding_alone_gives_theta_no_gradient():
    model = lora_fx.apply(nn.Embedding(9, 5, padding_idx=2), RULE, IDS)
    reference.fill(model)
    model(torch.full((2, 3), 2)).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "dora", "bottleneck"])
@pytest.mark.parametrize("width", [6, 256])
def test_a_checkpoint_that_runs_again_in_backward_finds_what_it_found_before(width, kind):
    """There it is seen op by op, and a call that is seen takes another way than one that is not."""
    torch.manual_seed(0)
    model = Blocks(width)
    lora_fx.apply(model, Rule(where="*", rank=2, kind=kind), torch.randn(16, width))  # the check runs here
    reference.fill(model)
    x = torch.randn(16, width)
    found = []
    for again in (True, False):
        model.again = again
        factors = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(model(x).square().sum(), factors))
    assert all(map(torch.equal, *found))


class Blocks(nn.Module):
    again = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Parameter(torch.randn(width + 1, width) / width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.up(x).tanh(), self.down)


def test_products_by_way_of_float32():
    """In the check's backward on a CPU: the same as torch's own kernels, but for rounding."""
    torch.manual_seed(0)
    x, w, y, b = (torch.randn(*shape).bfloat16() for shape in [(5, 3000), (3000, 900), (5, 900), (900,)])
    broken = torch.full_like(y, float("nan"))
    products = (
        lambda: x @ w,
        lambda: torch.addmm(b, x, w, beta=0.5, alpha=2),
        lambda: y.clone().addmm_(x, w, alpha=3),
        lambda: broken.clone().addmm_(x, w, beta=0),
        lambda: torch.baddbmm(y[None], x[None], w[None], beta=2),
    )
    for product in products:
        own = product()
        with _InFloat32(torch.bfloat16):
            wide = product()
        assert wide.dtype == own.dtype
        assert compare(wide, own, own, 0.0, own.dtype)
