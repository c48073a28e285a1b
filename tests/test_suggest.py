"""`suggest`: which sites get which rank, held against dense decompositions, brute force and the step itself."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.application import suggestion
from lora_fx.application.suggestion import allocate, better
from tests import reference
from tests.zoo.native_models import Experts

EPS = torch.finfo(torch.float64).eps


class Fixed(nn.Module):
    """A loss whose gradient of each weight is a matrix of the test's own: Σ ⟨C, W⟩."""

    def __init__(self, *gradients: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(C.shape[1], C.shape[0], bias=False, dtype=C.dtype) for C in gradients)
        self.gradients = gradients

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        eyes = (torch.eye(C.shape[1], dtype=C.dtype) * scale for C in self.gradients)
        outputs = [layer(eye) for layer, eye in zip(self.layers, eyes, strict=True)]
        return torch.stack([(out.mT * C).sum() for out, C in zip(outputs, self.gradients, strict=True)])


def fixed_loss(model: nn.Module, scale: torch.Tensor) -> torch.Tensor:
    return model(scale).sum()


def with_spectrum(out: int, inner: int, values: list[float], seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64, generator=draw))[0] for n in (out, inner))
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.mT


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 20), nn.Linear(20, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.attention(x, x, x, need_weights=False)[0]
        h = self.norm(h.mT).mT
        return self.head(h + self.down(F.gelu(self.up(h)))).mean(1)


def classifier(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = Classifier().to(dtype)
    return model, [(torch.randn(6, 7, 8, dtype=dtype), torch.randint(0, 5, (6,))) for _ in range(3)]


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_choice_of_as_many_parameters_decreases_more():
    """Whatever the costs, where the budget is spent to the last parameter."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        squares = [torch.randint(1, 100, (3,), generator=draw).sort(descending=True)[0].tolist() for _ in range(3)]
        costs = torch.randint(1, 6, (3,), generator=draw).tolist()
        every = sorted(((own / costs[n], n) for n, values in enumerate(squares) for own in values), reverse=True)
        budget = sum(costs[n] for _, n in every[: int(torch.randint(1, 10, (1,), generator=draw))])
        ranks = allocate(squares, costs, budget)
        chosen, spent = decrease(squares, ranks), sum(r * c for r, c in zip(ranks, costs, strict=True))
        others = [o for o in itertools.product(range(4), repeat=3) if sum(map(operator.mul, o, costs)) <= spent]
        assert spent <= budget and chosen == max(decrease(squares, other) for other in others)


def decrease(squares: list[list[int]], ranks: Sequence[int]) -> int:
    return sum(sum(values[:rank]) for values, rank in zip(squares, ranks, strict=True))


def test_what_does_not_fit_is_passed_over_for_what_does():
    assert allocate([[9.0, 8.0], [1.0]], [5, 2], 7) == [1, 1]
    assert allocate([[0.0], [1.0, 0.0]], [1, 1], 5) == [0, 1]


def test_one_rank_for_all_where_what_is_left_over_makes_it_better():
    squares, costs = [[7.2, 1.0], [6.0, 5.7]], [8, 6]
    assert allocate(squares, costs, 14) == [0, 2] and better(squares, [0, 2], [1, 1]) == [1, 1]
    assert better(squares, [1, 0], [1, 0]) == [1, 0] and better(squares, [1, 1], [0, 2]) == [1, 1]


def test_ranks_follow_the_gradients_singular_values():
    model = Fixed(with_spectrum(9, 6, [5, 4, 0.5]), with_spectrum(6, 9, [4.5, 0.1, 0.01], 1))
    found = lora_fx.suggest(model, 3 * 15, [torch.tensor(1.0), torch.tensor(3.0)], fixed_loss)
    assert [site.rank for site in found.sites] == [2, 1] and found.parameters == 45
    mean = 2.0  # of the batches
    wanted = [mean**2 * (25 + 16), mean**2 * 4.5**2]
    for site, own in zip(found.sites, wanted, strict=True):
        assert abs(site.predicted / found.rate - own) <= 15 * EPS * mean**2 * 25 * 2  # of σ, and doubled by squaring
    assert [(rule.where, rule.rank) for rule in found] == [("layers.0.weight", 2), ("layers.1.weight", 1)]
    assert (found.uniform_rank, len(found.rules)) == (1, 2)
    assert found.together.predicted > found.uniform.predicted


def test_a_wide_gradient_is_found_without_being_kept():
    values = [float(2.0**-k) for k in range(12)]
    C = with_spectrum(70, 50, values)
    found = lora_fx.suggest(Fixed(C), 4 * 120, [torch.tensor(1.0)] * 2, fixed_loss, most=4)
    (site,) = found.sites
    exact = torch.linalg.svdvals(C)[:4].square().sum()
    assert site.rank == 4 and abs(site.predicted / found.rate - exact) <= 2 * 120 * EPS * exact


def test_no_more_than_one_gradient_is_there_at_a_time(monkeypatch):
    model, batches = classifier()
    alive, add = [], suggestion._Spectrum.add

    def watched(self, gradient):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        add(self, gradient)

    monkeypatch.setattr(suggestion._Spectrum, "add", watched)
    lora_fx.suggest(model, 500, batches, cross_entropy, measure=False)
    assert set(alive) == {1} and len(alive) >= 3 * 6


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_step_is_what_was_predicted_to_first_order_site_by_site():
    model, batches = classifier()
    found = lora_fx.suggest(model.eval(), 300, batches, cross_entropy)
    assert found.correlation is not None and found.correlation >= 0.9
    assert {site.role for site in found.sites if site.rank} >= {"attention.value", "mlp.up", "mlp.down"}
    measured = [site.measured for site in found.sites if site.rank]
    assert all(own is not None and own > 0 for own in measured)
    assert found.together.measured > found.uniform.measured > 0
    text = str(found)
    assert f"{found.parameters} parameters of a budget of 300" in text and "rank correlation" in text
    assert found.to_json()["sites"][0]["weight"] == found.sites[0].weight


def test_a_measured_step_is_the_dense_one():
    """A loss that is linear in the weights decreases by exactly what is predicted."""
    model = Fixed(with_spectrum(9, 6, [5, 4, 0.5]), with_spectrum(6, 9, [4.5, 0.1], 1))
    found = lora_fx.suggest(model, 45, [torch.tensor(1.0)], fixed_loss)
    size = sum(
        float(C.norm() * layer.weight.detach().norm()) for C, layer in zip(model.gradients, model.layers, strict=True)
    )
    for site in found.sites:
        assert abs(site.measured - site.predicted) <= 100 * EPS * size  # a sum of some hundred products
    assert abs(found.together.measured - found.together.predicted) <= 100 * EPS * size


def test_experts_get_one_rank_each():
    torch.manual_seed(0)
    model = Experts().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(30, 12, dtype=torch.float64)
    found = lora_fx.suggest(model, 10**6, [x], lambda m, b: m(b).square().mean(), Rule(where="*", rank=1), most=2)
    (stacked,) = [site for site in found.sites if len(site.shape) == 3][:1]
    experts, a, b = stacked.shape
    assert stacked.rank == 2 and stacked.parameters == 2 * experts * (a + b)


# ── what is left ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_of_the_model_changes():
    model, batches = classifier(torch.float32)
    model.train()
    model.head.weight.requires_grad_(False)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    before, trained = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    random, keys = torch.get_rng_state(), set(vars(model))
    lora_fx.suggest(model, 500, batches, cross_entropy)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and type(model) is Classifier
    assert trained == {n: p.requires_grad for n, p in model.named_parameters()}
    assert torch.equal(random, torch.get_rng_state()) and set(vars(model)) == keys
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {"up.weight"} and bool((model.up.weight.grad == 1).all())
    assert not lora_fx.adapters(model) and not model._forward_pre_hooks


def test_apply_takes_it_with_the_settings_of_the_sites():
    model, batches = classifier()
    sites = Rule(role="attention.*", rank=7, alpha=3, dropout=0.25)
    found = lora_fx.suggest(model.train(), 100, batches, cross_entropy, sites)
    lora_fx.apply(model, found, batches[0][0])
    own = [module for module in model.modules() if isinstance(module, lora_fx.Adapter)]
    assert sum(p.numel() for a in own for p in a.parameters()) == found.parameters <= 100
    assert {(a.alpha, a.dropout.p) for a in own} == {(3.0, 0.25)}
    assert {a.role for a in own} == {site.role for site in found.sites if site.rank}
    reference.fill(model)
    assert lora_fx.certify(model, batches[0][0])


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "a budget below any rank": (dict(budget=3), "less than one rank of any site has"),
    "no whole number": (dict(budget=2.5), "budget=2.5"),
    "no rank": (dict(most=0), "most=0"),
    "no batches": (dict(batches=[]), "there are no batches"),
    "no scalar": (dict(loss=lambda m, b: m(b[0])), r"\(6, 5\) is no scalar"),
    "no tensor": (dict(loss=lambda m, b: m(b[0]).sum().item()), "is no scalar tensor"),
    "not finite": (dict(loss=lambda m, b: m(b[0]).sum() * math.inf), "is not finite"),
    "no dependence": (dict(loss=lambda m, b: m(b[0]).detach().sum()), "does not depend on any"),
    "no gradient": (dict(loss=lambda m, b: m(b[0]).sum() * 0), "no gradient reaches any"),
    "no finite gradient": (dict(loss=lambda m, b: (m(b[0]).sum() * 0).sqrt()), "gradient holds NaN or Inf"),
    "no call": (dict(loss=lambda m, b: m.head(b[0]).sum()), "does not call the model"),
    "a kind without ranks": (dict(sites=Rule(where="head", kind="full")), "the kind 'full' has no ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    model, batches = classifier()
    before = state(model)
    given, words = REFUSED[case]
    with pytest.raises(LoraFxError, match=words):
        lora_fx.suggest(**{"model": model, "budget": 100, "batches": batches, "loss": cross_entropy, **given})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and not lora_fx.adapters(model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model._forward_pre_hooks


def test_refuses_a_model_with_adapters():
    model, batches = classifier()
    lora_fx.apply(model, Rule(where="head", rank=2), batches[0][0])
    with pytest.raises(LoraFxError, match="has adapters already"):
        lora_fx.suggest(model, 100, batches, cross_entropy)
