"""The check of activation rewrites: each use and each block by itself, in float64, against what the papers say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.regions import drawn_ids
from lora_fx.deltas.kinds import REWRITES
from lora_fx.deltas.rewrites import Using, bottleneck
from lora_fx.errors import CaptureError, EquivalenceError
from lora_fx.model import behind
from lora_fx.passes import insert
from lora_fx.testing.comparing import bits
from tests.test_rewrites import assert_bits, refusal

WIDE, WORDS = 4096, 64


class Narrow(nn.Module):
    """4096 features, and hardly a product."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDE, 32 + k), nn.Linear(32 + k, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(F.gelu(self.down(x)))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDE)
        self.blocks = nn.ModuleList(Narrow(k) for k in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return x


#: fewer than the new tokens of a rule: not each of them is among the example inputs
SOME = torch.tensor([[1, 2, 3], [4, 5, 6]])
NARROWED = Rule(where="blocks.*.up", kind="bottleneck", rank=4, settings={"norm": True})
SHARED = Rule(where="blocks.*.up", kind="compacter", rank=4)
PREFIXED = Rule(where="words", kind="tokens", settings={"prefix": 6, "infix": 2})
BEHIND = replace(PREFIXED, kind="prefix_layer")


def wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide().bfloat16()


class Other:
    """θ with something else in it."""

    def __init__(self, theta: Any, **instead: Any) -> None:
        self.__dict__.update({**vars(theta), **instead})


def without_residual(use: Using, theta: Any) -> Any:
    return bottleneck(use, theta) - use.of(use.x)


def a_hundredth_more(use: Using, theta: Any) -> Any:
    return bottleneck(use, Other(theta, up=theta.up * 1.01, up_bias=theta.up_bias * 1.01))


def nearly_the_function(use: Using, theta: Any) -> Any:
    y = use.of(use.x)
    z = F.layer_norm(y, (use.space.out,), theta.norm_weight, theta.norm_bias)
    return y + F.linear(F.gelu(F.linear(z, theta.down, theta.down_bias), approximate="tanh"), theta.up, theta.up_bias)


def not_in_the_last_layer(use: Using, theta: Any) -> Any:
    return use.of(use.x) if use.space.inner == 34 else bottleneck(use, theta)


def of_another_epsilon(use: Using, theta: Any) -> Any:
    y = use.of(use.x)
    z = F.layer_norm(y, (use.space.out,), theta.norm_weight, theta.norm_bias, 1e-6)
    return y + F.linear(F.gelu(F.linear(z, theta.down, theta.down_bias)), theta.up, theta.up_bias)


def without_gain(use: Using, theta: Any) -> Any:
    return bottleneck(use, Other(theta, norm_weight=torch.ones_like(theta.norm_weight)))


def of_the_norm(use: Using, theta: Any) -> Any:
    z = F.layer_norm(use.of(use.x), (use.space.out,), theta.norm_weight, theta.norm_bias)
    return z + bottleneck(use, theta) - use.of(use.x)


def factors_exchanged(use: Using, theta: Any) -> Any:
    return REWRITES["compacter"].around(use, Other(theta, shared=theta.shared.mT))


def last_infix_is_the_one_before(use: Using, theta: Any) -> Any:
    return REWRITES["tokens"].around(use, Other(theta, tokens=theta.tokens[[0, 1, 2, 3, 4, 5, 6, 6]]))


def last_word_is_new(use: Using, theta: Any) -> Any:
    n = use.space.inner
    own = F.embedding((use.x - n).clamp(min=0), theta.tokens)
    return torch.where((use.x >= n - 1).unsqueeze(-1), own, use.of(use.x.clamp(max=n - 1)))


def all_new_are_one_word(use: Using, theta: Any) -> Any:
    return use.of(torch.where(use.x >= use.space.inner, 0, use.x))


def one_position_later(h: Any, ids: Any, theta: Any, n: int) -> Any:
    return REWRITES["prefix_layer"].behind(h, ids.roll(1, -1), theta, n)  # type: ignore[misc]


def one_row_further(h: Any, ids: Any, theta: Any, n: int) -> Any:
    return REWRITES["prefix_layer"].behind(h, ids, theta.roll(1, 0), n)  # type: ignore[misc]


def added(h: Any, ids: Any, theta: Any, n: int) -> Any:
    return torch.where((ids >= n).unsqueeze(-1), h, 0) + REWRITES["prefix_layer"].behind(h, ids, theta, n)  # type: ignore[misc]


def nothing_behind(h: Any, ids: Any, theta: Any, n: int) -> Any:
    return h


MUTANTS: list[tuple[Rule, str, Callable[..., Any]]] = [
    *((NARROWED, "around", own) for own in (
        without_residual, a_hundredth_more, nearly_the_function, not_in_the_last_layer, of_another_epsilon,
        without_gain, of_the_norm,
    )),
    (SHARED, "around", factors_exchanged),
    *((PREFIXED, "around", own) for own in (last_infix_is_the_one_before, last_word_is_new)),
    (BEHIND, "around", all_new_are_one_word),
    *((BEHIND, "behind", own) for own in (one_position_later, one_row_further, added, nothing_behind)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "part", "own"), MUTANTS, ids=lambda one: getattr(one, "__name__", ""))
def test_apply_sees_a_small_fault_of_a_rewrite_in_bfloat16(rule, part, own, monkeypatch):
    row = REWRITES[rule.kind]
    found, wrong = wide(), replace(row, **{part: own})
    before = bits(found)
    monkeypatch.setattr(insert, "make_adapter", _with(insert.make_adapter, wrong))
    said = refusal(EquivalenceError, lora_fx.apply, found, rule, SOME)
    assert "is not what its kind makes of it" in said and "in float64" in said
    assert_bits(found, before)


def _with(make: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    def made(*arguments: Any) -> Any:
        adapter = make(*arguments)
        adapter.change(kind=kind)
        return adapter

    return made


def test_apply_sees_blocks_in_another_order(monkeypatch):
    def stand(adapter: Any, calls: list[nn.Module], blocks: dict[str, nn.Module]) -> None:
        behind.stand(adapter, calls, dict(zip(blocks, reversed(blocks.values()), strict=True)))

    monkeypatch.setattr(insert, "stand", stand)
    said = refusal(EquivalenceError, lora_fx.apply, wide(), BEHIND, SOME)
    assert "behind it block_0 in blocks.0" in said and "in float64" in said


@pytest.mark.parametrize("rule", [NARROWED, SHARED, PREFIXED, BEHIND], ids=lambda own: own.kind)
def test_what_is_right_is_seen_to_be_in_float64(rule):
    found = lora_fx.apply(wide(), rule, SOME)
    certificate = lora_fx.certify(found, SOME)
    assert certificate and {row.dtype for row in certificate.rows} == {"float64"}
    assert all(row.error <= row.bound < 2.0**-40 < row.effect for row in certificate.rows)
    assert len(certificate.rows) == {"tokens": 1, "prefix_layer": 4}.get(rule.kind, 3)


def test_new_ids_are_all_looked_up_among_words():
    for like in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.long)):
        found = list(drawn_ids(like, WORDS, 5))
        assert all(own.shape == like.shape and own.dtype == like.dtype for own in found)
        drawn = torch.stack(found).flatten().tolist()
        assert {own for own in drawn if own >= WORDS} == set(range(WORDS, WORDS + 5))
        assert {0, WORDS - 1} < {own for own in drawn if own < WORDS} and min(drawn) == 0


def test_of_two_rewrites_behind_each_other_each_is_seen():
    found, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)
    lora_fx.apply(found, Rule(where="*", kind="bottleneck", rank=2), x)
    assert [row.dtype for row in lora_fx.certify(found, x).rows] == ["float64", "float64"]


class Branching(nn.Module):
    """Graphs that a graph calls: what is in them is not compared."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(WORDS, 6), nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.up(self.words(ids))
        return torch.cond(y.sum() > 1e4, lambda z: z * 2, lambda z: z + 1, (y,))


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (Rule(where="up", kind="bottleneck", rank=2), without_residual),
        (replace(PREFIXED, settings={"prefix": 1}), lambda use, theta: use.of(use.x.clamp(max=WORDS - 1))),
    ],
    ids=["bottleneck", "tokens"],
)
def test_what_cannot_be_told_apart_is_checked_as_a_whole(rule, wrong, monkeypatch):
    torch.manual_seed(0)
    found, lost = Branching(), Branching()
    certificate = lora_fx.certify(lora_fx.apply(found, rule, SOME), SOME)
    assert certificate and [row.dtype for row in certificate.rows] == ["float32"]
    monkeypatch.setattr(insert, "make_adapter", _with(insert.make_adapter, replace(REWRITES[rule.kind], around=wrong)))
    assert "is not the model with W + δ" in refusal(EquivalenceError, lora_fx.apply, lost, rule, SOME)


def test_a_table_is_looked_up_as_it_is(monkeypatch):
    found, widest = lora_fx.apply(wide(), PREFIXED, SOME), []
    number = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, *a, **k: widest.append(self.shape) or number(self, *a, **k))
    assert lora_fx.certify(found, SOME)
    assert widest and (WORDS, WIDE) not in widest


class Experts(nn.Module):
    """Each token goes to one expert, in a loop over those that some token goes to, as library models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(12, 12), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Linear(12, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        share, chosen = self.router(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 8)
        for k in chosen.unique().tolist():
            (own,) = (chosen == k).nonzero(as_tuple=True)
            out = out.index_add(0, own, self.experts[k](x[own]) * share[own, None])
        return out


EXPERTS = Rule(form="linear", kind="bottleneck", rank=2, settings={"norm": True}, otherwise="skip")


@pytest.mark.parametrize("seed", range(4))
def test_other_experts_than_the_models_own_are_no_fault(seed, monkeypatch):
    torch.manual_seed(seed)
    x, found, wrong = torch.randn(10, 12), Experts(), Experts()
    certificate = lora_fx.certify(lora_fx.apply(found, EXPERTS, x), x)
    assert certificate and {row.dtype for row in certificate.rows} == {"float64"}
    slight = replace(REWRITES["bottleneck"], around=a_hundredth_more)
    monkeypatch.setattr(insert, "make_adapter", _with(insert.make_adapter, slight))
    assert "is not" in refusal(EquivalenceError, lora_fx.apply, wrong, EXPERTS, x)


class Known(nn.Module):
    """A step for each word that is known, as no new one is."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.words(ids)
        return sum(place.sum() * y for place in (ids < WORDS).nonzero())


def test_a_program_that_new_words_do_not_fit_is_refused_by_name():
    torch.manual_seed(0)
    model = Known()
    before = bits(model)
    said = refusal(CaptureError, lora_fx.apply, model, replace(PREFIXED, settings={"prefix": 4}), SOME)
    assert "another path where something is rewritten" in said and "IndexError" in said
    assert_bits(model, before)
