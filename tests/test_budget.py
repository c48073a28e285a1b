"""AdaLoRA's budget: which ranks act, how many, and what is left of the model when it is finished."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Budget, Rule
from lora_fx.checks.verification import compare
from lora_fx.errors import AdapterError
from lora_fx.model.inventory import inventory
from tests import reference

RULE = Rule(where="*", kind="adalora", rank=4, alpha=6)


def adapted(*rules: Rule) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5)
    model, x = nn.Sequential(*layers), torch.randn(16, 6)
    return lora_fx.apply(model.requires_grad_(False), list(rules) or [RULE], x), x


def train(model: nn.Module, x: torch.Tensor, budget: Budget, steps: int, optimizer=None) -> list[int]:
    """How many singular values act after each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, 0.02)
    target, found = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), []
    for _ in range(steps):
        (F.mse_loss(model(x), target) + budget.penalty()).backward()
        optimizer.step()
        found.append(budget.step())
        optimizer.zero_grad()
    return found


def acting(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if name.endswith(".singular"))


def test_the_budget_falls_from_all_ranks_to_exactly_what_was_asked_for():
    model, x = adapted()
    budget = Budget(model, 5, 20, warmup=4, settle=6, every=2)
    assert [budget.at(t) for t in range(21)] == [
        12, 12, 12, 12, 12, 5 + int(7 * 0.9**3), 5 + int(7 * 0.8**3), 5 + int(7 * 0.7**3), 5 + int(7 * 0.6**3),
        5 + int(7 * 0.5**3), 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]  # fmt: skip
    every_other = [budget.at(t - t % 2) for t in range(1, 21)]
    assert train(model, x, budget, 20) == every_other
    assert acting(model) == 5


def test_the_most_important_ones_act_by_the_formulas_of_the_paper():
    """Equations 7 to 10, written down once more, over three steps of plain descent."""
    model, x = adapted()
    budget = Budget(model, 3, 3, sensitivity=0.6, uncertainty=0.7, orthogonality=0.0)
    theta = {n: p for n, p in model.named_parameters() if p.requires_grad}
    target = torch.randn(16, 5)
    with torch.no_grad():
        for p in theta.values():
            p.add_(0.1 * torch.randn_like(p))
    means, doubts = ({n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2))
    for step in range(3):
        F.mse_loss(model(x), target).backward()
        scores = {}
        with torch.no_grad():
            for p in theta.values():
                p.sub_(0.1 * p.grad)
            for n, p in theta.items():
                now = (p * p.grad).abs()
                means[n] = 0.6 * means[n] + 0.4 * now
                doubts[n] = 0.7 * doubts[n] + 0.3 * (now - means[n]).abs()
        s = {n: means[n] * doubts[n] for n in theta}
        for n in theta:
            if n.endswith(".singular"):
                base = n.removesuffix("singular")
                for k in range(4):
                    scores[n, k] = s[n][k, 0] + s[base + "P"][:, k].mean() + s[base + "Q"][k].mean()
        budget.step()
        for site, adapter in budget.adapters.items():
            own = [s_k for (n, _), s_k in scores.items() if n.startswith(site.replace("weight", "weight_"))]
            wanted = torch.stack(own)
            assert compare(budget._score(site, adapter), wanted, wanted, 0.0, torch.float32)
        best = sorted(scores, key=lambda key: -scores[key])[: budget.at(step + 1)]
        assert {(n, k) for n in theta if n.endswith(".singular") for k in range(4) if theta[n][k] != 0} == set(best)
        model.zero_grad()


def test_the_penalty_is_how_far_p_and_q_are_from_orthogonal():
    model, _ = adapted()
    budget = Budget(model, 3, 10, orthogonality=0.5)
    wanted = 0.0
    for place in inventory(model).places:
        P, Q = (place.adapter.get_parameter(name).detach().double() for name in "PQ")
        wanted += 0.5 * float((P.T @ P - torch.eye(4)).square().sum() + (Q @ Q.T - torch.eye(4)).square().sum())
    exact = torch.tensor(wanted, dtype=torch.float64)
    assert compare(budget.penalty().detach(), exact, exact, 0.0, torch.float32)
    budget.penalty().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {n for n, p in model.named_parameters() if n.endswith((".P", ".Q"))}
    with torch.no_grad():
        for place in inventory(model).places:
            for name, p in place.adapter.named_parameters():
                if name != "singular":
                    nn.init.orthogonal_(p)
    assert float(budget.penalty().detach()) < 0.5 * 6 * 4 * 4 * (64 * torch.finfo(torch.float32).eps) ** 2


def test_pruned_ranks_leave_the_forward_the_file_and_the_fold(tmp_path):
    model, x = adapted()
    base = copy.deepcopy(model)
    budget = Budget(model, 2, 6)
    train(model, x, budget, 6)
    before, kept = model(x).detach(), {n: p.detach().clone() for n, p in model.named_parameters()}
    whole = sum(p.numel() for n, p in kept.items() if n.endswith((".P", ".Q", ".singular")))
    assert budget.finish() is model and acting(model) == 2
    here = inventory(model)
    assert sum(adapter.rank for adapter in here.adapters) == 2 and 1 <= len(here.adapters) <= 2
    assert sum(p.numel() for a in here.adapters for p in a.parameters()) < whole / 4
    after = model(x).detach()
    assert compare(after, before, before, 8 * torch.finfo(torch.float32).eps, torch.float32)
    for place in here.places:
        index = (kept[f"{place.path}.{place.child}.singular"] != 0).view(-1).nonzero().view(-1)
        assert torch.equal(place.adapter.get_parameter("P"), kept[f"{place.path}.{place.child}.P"][:, index])
        assert torch.equal(place.adapter.get_parameter("Q"), kept[f"{place.path}.{place.child}.Q"][index])
        assert place.adapter.scale == 6 / 4
    assert lora_fx.certify(model, x)
    lora_fx.save_adapter(model, tmp_path, peft=False)
    fresh = copy.deepcopy(base)
    lora_fx.remove(fresh, "default")
    lora_fx.load_adapter(fresh, tmp_path, x)
    assert reference.same_bits(reference.bits(fresh), reference.bits(model))
    lora_fx.fold(model)
    folded = model(x).detach()
    assert compare(folded, after, after, 64 * torch.finfo(torch.float32).eps, torch.float32)
    lora_fx.unfold(model)
    assert torch.equal(model(x), after)
    assert budget.finish() is model and acting(model) == 2  # a second time: nothing to do


def test_a_run_that_goes_on_from_its_state_is_the_same_run():
    def part(model, x, budget, optimizer, steps):
        return train(model, x, budget, steps, optimizer)

    model, x = adapted()
    budget = Budget(model, 4, 12, warmup=2, settle=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    part(model, x, budget, optimizer, 5)
    other = copy.deepcopy(model)
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 0.02)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = Budget(other, 4, 12, warmup=2, settle=3)
    resumed.load_state_dict(budget.state_dict())
    assert part(model, x, budget, optimizer, 7) == part(other, x, resumed, again, 7)
    assert reference.same_bits(reference.bits(model), reference.bits(other))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ranks": 0}, "ranks=0 cannot be\n.*from 1 to 12"),
        ({"ranks": 13}, "ranks=13 cannot be\n.*from 1 to 12"),
        ({"ranks": 2.5}, "ranks=2.5"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": 8, "settle": 8}, "warmup=8 and settle=8"),
        ({"every": True}, "every=True"),
        ({"sensitivity": 1.0}, "sensitivity=1.0"),
        ({"orthogonality": -1}, "orthogonality=-1"),
        ({"name": "other"}, "there is no adapter named 'other'"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(arguments, words):
    model, _ = adapted()
    with pytest.raises(AdapterError, match=words):
        Budget(model, **{"ranks": 4, "steps": 10, **arguments})


def test_of_another_kind_without_gradients_or_with_nothing_left_it_is_refused():
    model, x = adapted(Rule(where="0", rank=2), RULE)
    with pytest.raises(AdapterError, match=r"0\.weight, adapter 'default': it is of the kind 'lora'"):
        Budget(model, 3, 10)
    model, x = adapted()
    budget, state = Budget(model, 3, 10), reference.bits(model)
    with pytest.raises(AdapterError, match="P has no gradient"):
        budget.step()
    with pytest.raises(AdapterError, match="every singular value of the adapter 'default' is 0"):
        budget.finish()
    (model(x) * float("nan")).sum().backward()
    with pytest.raises(AdapterError, match="has a gradient with NaN or Inf"):
        budget.step()
    assert reference.same_bits(reference.bits(model), state) and budget.taken == 0
    other = Budget(adapted(Rule(where="0", kind="adalora", rank=4))[0], 3, 10)
    with pytest.raises(AdapterError, match="of other sites or shapes"):
        budget.load_state_dict(other.state_dict())
