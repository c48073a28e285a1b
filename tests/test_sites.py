"""What is a site: every operand of a product that comes from parameters alone, whatever the other operand is.

Each row of the table is a small model with odd operands. Its sites are found, the adapted model is the model with
W + δ in its weights, every use is certified, and folding and unfolding are exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lora_fx
from lora_fx import Rule
from lora_fx.errors import PlanError
from lora_fx.passes.realising import is_dense
from lora_fx.testing import assert_equivalent, assert_folds_exactly
from tests import reference

X = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
LINEAR = nn.Linear


def r(*shape: int) -> torch.Tensor:
    return 0.5 * torch.randn(*shape)


class Odd(nn.Module):
    """`how` of its parameters, modules and buffers (whose names begin with ``buf``), then a head."""

    def __init__(self, how: Callable, **own: nn.Module | torch.Tensor):
        super().__init__()
        for name, value in own.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif name.startswith("buf"):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.how, self.head = how, nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.how(self, x))


def standardised(w: torch.Tensor, *dims: int) -> torch.Tensor:
    return (w - w.mean(dims, keepdim=True)) / (w.std(dims, keepdim=True) + 1e-5)


def cross(m, q, x):
    return F.scaled_dot_product_attention(q, m.k(x), m.v(x))


def added_(m, op: str, x, weight, **options):
    y = m.v(x).clone()
    return getattr(y, op)(x, weight, **options)


def styled(m, x):
    """As StyleGAN 2 has it: each sample a convolution of its own, in one with groups."""
    w = m.a[None] * x.mean(1)[:, None, :, None]
    w = w * torch.rsqrt(w.square().sum((2, 3), keepdim=True) + 1e-8)
    batch, out, features, taps = w.shape
    y = F.conv1d(x.mT.reshape(1, batch * features, -1), w.reshape(batch * out, features, taps), padding=1, groups=batch)
    return y.view(batch, out, -1)


QKV = dict(q=LINEAR(4, 6), k=LINEAR(4, 6), v=LINEAR(4, 6))
V = dict(v=LINEAR(4, 6))
MASK = dict(buf=(torch.arange(24).view(6, 4) % 3 > 0).float())

#: id: (sites as "form layout", a dense one with "W + δ" behind; forward; what it is made of)
#: A constant, a buffer or a parameter is the other operand of these.
FIXED = {
    "a linear on a parameter": (
        {"q.weight": "linear oi"}, lambda m, x: cross(m, m.q(m.latents), x), QKV | dict(latents=r(5, 4))),
    "a linear on an expanded parameter": (
        {"q.weight": "linear oi"}, lambda m, x: cross(m, m.q(m.latents.expand(3, -1, -1)), x),
        QKV | dict(latents=r(1, 5, 4))),
    "a linear on a normed parameter": (
        {"q.weight": "linear oi"}, lambda m, x: cross(m, m.q(m.norm(m.latents)), x),
        QKV | dict(latents=r(5, 4), norm=nn.LayerNorm(4))),
    "linears on a constant": (
        {"a.weight": "linear oi", "c.weight": "linear oi"},
        lambda m, x: m.v(x) + m.c(F.silu(m.a((torch.arange(4.0) * 0.3).sin()))),
        V | dict(a=LINEAR(4, 8), c=LINEAR(8, 6))),
    "a linear on a buffer": (
        {"a.weight": "linear oi"}, lambda m, x: m.v(x) + m.a(m.buf), V | dict(a=LINEAR(4, 6), buf=r(4))),
    "a convolution on a buffer": (
        {"a.weight": "conv oii"}, lambda m, x: (m.a(x.mT) + m.a(m.buf)).mT,
        dict(a=nn.Conv1d(4, 6, 3, padding=1), buf=r(1, 4, 7))),
    "a rotation of a weight": (
        {"a": "matmul io"}, lambda m, x: F.linear(x, m.buf @ m.a), dict(a=r(4, 4), buf=r(6, 4))),
    "an embedding of all positions": (
        {"table.weight": "embedding io"}, lambda m, x: m.v(x) + m.table(torch.arange(7)),
        V | dict(table=nn.Embedding(9, 6))),
}  # fmt: skip
#: Of two parameters each may be the weight.
BOTH = {
    "two parameters": (
        {"a": "matmul oi", "c": "matmul io"}, lambda m, x: x @ (m.a @ m.c), dict(a=r(4, 3), c=r(3, 6))),
    "latents and a matrix": (
        {"q": "matmul io", "latents": "matmul oi"}, lambda m, x: cross(m, m.latents @ m.q, x),
        dict(k=LINEAR(4, 6), v=LINEAR(4, 6), q=r(4, 6), latents=r(5, 4))),
    "an einsum of two": (
        {"a": "einsum oi", "c": "einsum io"}, lambda m, x: x @ torch.einsum("ab,bc->ac", m.a, m.c),
        dict(a=r(4, 3), c=r(3, 6))),
    "a product added to a weight": (
        {"w": "linear oi W + δ", "a": "matmul oi", "c": "matmul io"}, lambda m, x: F.linear(x, m.w + m.a @ m.c),
        dict(w=r(6, 4), a=r(6, 2), c=r(2, 4))),
    "a chain": (
        {"a": "chain_matmul oi W + δ", "c": "chain_matmul oi W + δ"}, lambda m, x: torch.chain_matmul(x[0], m.a, m.c),
        dict(a=r(4, 3), c=r(3, 6))),
    "multi_dot": (
        {"a": "linalg_multi_dot oi W + δ", "c": "linalg_multi_dot oi W + δ"},
        lambda m, x: torch.linalg.multi_dot([x[0], m.a, m.c]), dict(a=r(4, 3), c=r(3, 6))),
}  # fmt: skip
#: These are computed from parameters before they multiply.
COMPUTED = {
    "cat of linears": (
        dict.fromkeys(("q.weight", "k.weight", "v.weight"), "linear oi W + δ"),
        lambda m, x: F.scaled_dot_product_attention(
            *F.linear(x, torch.cat([m.q.weight, m.k.weight, m.v.weight])).chunk(3, -1)), QKV),
    "cat of columns": (
        dict.fromkeys("ac", "matmul io W + δ"), lambda m, x: x @ torch.cat([m.a, m.c], 1), dict(a=r(4, 2), c=r(4, 4))),
    "cat of inputs": (
        dict.fromkeys("ac", "linear oi W + δ"), lambda m, x: F.linear(x, torch.cat([m.a, m.c], 1)),
        dict(a=r(6, 2), c=r(6, 2))),
    "stack": (
        dict.fromkeys("ace", "bmm io W + δ"), lambda m, x: torch.bmm(x, torch.stack([m.a, m.c, m.e])),
        dict(a=r(4, 6), c=r(4, 6), e=r(4, 6))),
    "mask": ({"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.a * m.buf), dict(a=r(6, 4), **MASK)),
    "mask of experts": (
        {"a": "bmm bio W + δ"}, lambda m, x: x.bmm(m.a * m.buf.mT), dict(a=r(3, 4, 6), **MASK)),
    "a causal mixer": (
        {"a": "matmul oi W + δ"}, lambda m, x: m.a.tril().softmax(-1) @ m.v(x), V | dict(a=r(7, 7))),
    "a mask made in the forward": (
        {"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.a * torch.ones(6, 4).tril()), dict(a=r(6, 4))),
    "where": (
        {"a": "linear oi W + δ"}, lambda m, x: F.linear(x, torch.where(m.buf > 0, m.a, 0.0)), dict(a=r(6, 4), **MASK)),
    "flip": ({"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.a.flip(0)), dict(a=r(6, 4))),
    "pad": ({"a": "linear oi W + δ"}, lambda m, x: F.linear(x, F.pad(m.a, (0, 0, 1, 0))), dict(a=r(5, 4))),
    "rows by index": (
        {"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.a[torch.tensor([0, 2, 4, 6, 8, 1])]), dict(a=r(9, 4))),
    "standardised, transposed": (
        {"a": "linear io W + δ"}, lambda m, x: F.linear(x, standardised(m.a, 0).t()), dict(a=r(4, 6))),
    "a standardised convolution": (
        {"a": "conv1d oii W + δ"}, lambda m, x: F.conv1d(x.mT, standardised(m.a, 1, 2), padding=1).mT,
        dict(a=r(6, 4, 3))),
    "a gain on it": (
        {"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.g * standardised(m.a, 1)), dict(a=r(6, 4), g=r(6, 1))),
    "a norm by hand": (
        {"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.g * m.a / m.a.norm(dim=1, keepdim=True)),
        dict(a=r(6, 4), g=r(6, 1))),
    "scaled": ({"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.a * 0.5), dict(a=r(6, 4))),
    "a sum of two": (
        dict.fromkeys("ac", "linear oi W + δ"), lambda m, x: F.linear(x, m.a + m.c), dict(a=r(6, 4), c=r(6, 4))),
    "symmetric": ({"a": "matmul io W + δ"}, lambda m, x: m.v(x @ (m.a + 0.5 * m.a.T)), V | dict(a=r(4, 4))),
    "a square of itself": ({"a": "matmul oi W + δ"}, lambda m, x: m.v(x @ (m.a @ m.a.T)), V | dict(a=r(4, 3))),
    "its spectral norm by hand": (
        {"a": "mv oi W + δ"}, lambda m, x: F.linear(x, m.a / torch.mv(m.a, m.buf).norm()), dict(a=r(6, 4), buf=r(4))),
    "a sum within a cat": (
        dict.fromkeys("ace", "linear oi W + δ"), lambda m, x: F.linear(x, torch.cat([m.c, m.e]) * 0.5 + m.a),
        dict(a=r(6, 4), c=r(2, 4), e=r(4, 4))),
}  # fmt: skip
#: An activation scales the weight before it multiplies.
MODULATED = {
    "a style": (
        {"a": "bmm oi W + δ"}, lambda m, x: torch.bmm(x, (m.a * x.mean(1)[:, None, :]).mT), dict(a=r(6, 4))),
    "a style, demodulated, of a convolution": (
        {"a": "conv1d oii W + δ"}, lambda m, x: styled(m, x).mT, dict(a=r(6, 4, 3))),
    "a scale for each output": (
        {"a": "bmm io W + δ"}, lambda m, x: torch.bmm(x, m.a / (1 + x.mean((1, 2)).square())[:, None, None]),
        dict(a=r(4, 6))),
    "one scale": ({"a": "linear oi W + δ"}, lambda m, x: F.linear(x, m.a * x.mean()), dict(a=r(6, 4))),
    "a table that scales activations is none": (
        {}, lambda m, x: (m.v(x) * m.table) @ m.v(x).mT @ m.v(x), V | dict(table=r(7, 6))),
    "latents, scaled": (
        {"q.weight": "linear oi"}, lambda m, x: cross(m, m.q(m.latents * x.mean((1, 2))[:, None, None]), x),
        QKV | dict(latents=r(5, 4))),
}  # fmt: skip
#: Ops that multiply inside, or into what is there.
OPS = {
    "addmm_": (
        {"a": "addmm_ oi W + δ"}, lambda m, x: added_(m, "addmm_", x[0], m.a, beta=0.5, alpha=2.0) if x.ndim < 3 else
        torch.stack([added_(m, "addmm_", one, m.a, beta=0.5, alpha=2.0) for one in x]), V | dict(a=r(4, 6))),
    "baddbmm": ({"a": "addmm bio"}, lambda m, x: torch.baddbmm(m.v(x), x, m.a), V | dict(a=r(3, 4, 6))),
    "baddbmm_": ({"a": "baddbmm_ oii W + δ"}, lambda m, x: added_(m, "baddbmm_", x, m.a), V | dict(a=r(3, 4, 6))),
    "addbmm": ({"a": "addbmm oii W + δ"}, lambda m, x: torch.addbmm(m.v(x)[0], x, m.a), V | dict(a=r(3, 4, 6))),
    "addmv": ({"a": "addmv oi W + δ"}, lambda m, x: torch.addmv(m.b, m.a, x[0, 0]), dict(a=r(6, 4), b=r(6))),
    "addmv_": ({"a": "addmv_ oi W + δ"}, lambda m, x: m.b.clone().addmv_(m.a, x[0, 0]), dict(a=r(6, 4), b=r(6))),
    "mv": ({"a": "mv oi W + δ"}, lambda m, x: torch.mv(m.a, x[0, 0]), dict(a=r(6, 4))),
    "a vector and a matrix": ({"a": "matmul io"}, lambda m, x: x[0, 0] @ m.a, dict(a=r(4, 6))),
    "bilinear": ({"a": "bilinear oii W + δ"}, lambda m, x: F.bilinear(x, x.flip(1), m.a), dict(a=r(6, 4, 4))),
    "tensordot": (
        {"a": "tensordot oii W + δ"}, lambda m, x: torch.tensordot(x.unflatten(-1, (2, 2)), m.a, ([2, 3], [0, 2])),
        dict(a=r(2, 6, 2))),
    "inner": ({"a": "inner oi W + δ"}, lambda m, x: torch.inner(x, m.a), dict(a=r(6, 4))),
}  # fmt: skip
TABLE = FIXED | BOTH | COMPUTED | MODULATED | OPS


def build(name: str) -> nn.Module:
    _, how, own = TABLE[name]
    torch.manual_seed(0)
    return Odd(how, **copy.deepcopy(own))


def described(row) -> str:
    dense = " W + δ" if any(is_dense(use) for use in row.uses) else ""
    return f"{row.uses[0].form} {row.layout.sides}{dense}"


RULE = Rule(where="*", rank=1)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", TABLE)
def test_every_operand_that_comes_from_parameters_is_a_site(name):
    model, base = build(name), build(name)
    plain = {f"{one}.weight": "linear oi" for one in "qkv" if f"{one}.weight" in base.state_dict()}
    plan = lora_fx.plan(model, RULE, X)
    assert {row.name: described(row) for row in plan.rows} == {"head.weight": "linear oi"} | plain | TABLE[name][0]

    lora_fx.apply(model, RULE, X)
    reference.fill(model)
    dense = copy.deepcopy(base)
    for weight, total in reference.dense_weights(model).items():
        dense.get_parameter(weight).data.copy_(total)
    assert_equivalent(dense, model, X)
    assert not torch.equal(model(X), base(X))
    certificate = lora_fx.certify(model, X)
    assert certificate, str(certificate)
    assert_folds_exactly(model, X)


def test_latents_may_have_a_rule_of_their_own():
    """One of two adapted: its branch is a matmul with the other one as it is."""
    for where in ("latents", "q"):
        model, base = build("latents and a matrix"), build("latents and a matrix")
        lora_fx.apply(model, Rule(where=where, rank=2, kind=None), X)
        reference.fill(model)
        dense = copy.deepcopy(base)
        dense.get_parameter(where).data.copy_(reference.dense_weights(model)[where])
        assert_equivalent(dense, model, X)
        assert lora_fx.certify(model, X)


@pytest.mark.parametrize("kind", ["dora", "full"])
@pytest.mark.parametrize("name", ["mask", "cat of columns", "two parameters", "linears on a constant", "a sum of two"])
def test_every_kind_reads_them_so(name, kind):
    model = build(name)
    lora_fx.apply(model, Rule(where="*", kind=kind, **({"rank": 1} if kind == "dora" else {})), X)
    reference.fill(model)
    assert lora_fx.certify(model, X)
    assert_folds_exactly(model, X)


def test_roles_are_told_beside_latents_and_constants():
    plan = lora_fx.plan(build("a linear on a normed parameter"), RULE, X)
    roles = {row.name: row.role for row in plan.rows}
    assert roles["q.weight"] == "attention.query" and roles["k.weight"] == "attention.key"


def test_a_fused_projection_of_latents_is_split():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.fused = nn.Parameter(r(2, 5, 12)), nn.Linear(12, 36)
            self.out, self.read = nn.Linear(12, 12), nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.fused(self.latents).chunk(3, -1)
            return self.read(x).mean() + self.out(F.scaled_dot_product_attention(q, k, v))

    plan = lora_fx.plan(Latents(), Rule(role="attention.query", rank=2), X)
    (row,) = plan.rows
    assert (row.name, row.rows) == ("fused.weight", tuple(range(12)))


def test_of_two_weights_in_one_product_the_role_is_left_open():
    plan = lora_fx.plan(build("latents and a matrix"), RULE, X)
    reasons = {row.name: row.reason for row in plan.rows if row.role == "other"}
    assert "multiplies latents, and either" in reasons["q"] and "multiplies q, and either" in reasons["latents"]
    assert reasons["q"] in str(plan)


def test_what_is_written_into_a_constant_that_multiplies_is_refused():
    def forward(m, x):
        both = torch.empty(6, 4)
        both[:2], both[2:] = m.a, m.c
        return torch.bmm(x, both.t().expand(3, -1, -1) * 0.5)

    with pytest.raises(PlanError, match=r"a, c: the weight is written into a tensor .*bmm\)") as caught:
        lora_fx.plan(Odd(forward, a=r(2, 4), c=r(4, 4)), Rule(where="*", rank=1), X)
    assert "torch.cat" in caught.value.refusals[0].remedy


def chosen(m, x):
    h = m.l(x)
    return torch.cond(x.sum() > 0, lambda h: m.a(h), lambda h: (h @ m.b).relu(), (h,))


def test_weights_inside_of_a_cond_are_refused_and_the_others_are_sites():
    """In a branch that calls modules, too; and the remedies help."""

    def build(how=chosen):
        return Odd(how, l=LINEAR(4, 5), a=LINEAR(5, 6), b=r(5, 6))

    with pytest.raises(PlanError, match="inside of torch's cond, by a graph of its own") as caught:
        lora_fx.plan(build(), RULE, X)
    assert all(word in str(caught.value) for word in ("b, a.weight", "torch.where", "otherwise='skip'"))
    for rule in (Rule(where="l*", rank=2), Rule(where="*", rank=2, otherwise="skip")):
        model = lora_fx.apply(build().eval(), rule, X)
        assert {p.rpartition("_lora")[0] for p, _ in model.named_parameters() if p.endswith(".A")} >= {"l.weight"}
        reference.fill(model)
        folded = lora_fx.fold(copy.deepcopy(model))
        for x in (X, -X):
            assert_equivalent(model, folded, x)
    plan = lora_fx.plan(build(lambda m, x: torch.where(x.sum() > 0, m.a(m.l(x)), (m.l(x) @ m.b).relu())), RULE, X)
    assert {"a.weight", "b", "l.weight"} <= {row.name for row in plan.rows}


def test_a_product_into_out_is_refused():
    model = Odd(lambda m, x: torch.mm(x[0], m.a, out=torch.empty(7, 6)), a=r(4, 6))
    with pytest.raises(PlanError, match=r"a: the weight multiplies into out=…, .*\n.*assign the result"):
        lora_fx.plan(model, Rule(where="a", rank=1), X)


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight", "spectral"]
)
def test_what_torch_computes_a_weight_from_is_refused(make):
    model = nn.Sequential(make(nn.Linear(4, 6)), nn.Linear(6, 5))
    with pytest.raises(PlanError, match="computed before it multiplies") as caught:
        lora_fx.plan(model, RULE, X)
    assert "remove_parametrizations" in caught.value.remedy and len(caught.value.refusals) == 1


# ── autocast, compiled submodules ────────────────────────────────────────────────────────────────────────────────────


class Low(nn.Module):
    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype) if self.dtype else nullcontext():
            y = self.b(F.gelu(self.a(x)))
        return self.c(y.float())


WIDE = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_the_forward(dtype):
    """The bounds are those of the dtype in which an op ran."""
    torch.manual_seed(0)
    model = Low(dtype)
    lora_fx.apply(model, Rule(where="*", rank=2), WIDE)
    reference.fill(model)
    assert lora_fx.certify(model, WIDE)
    assert lora_fx.verify(model, lora_fx.fold(model, copy=True), WIDE)
    rounding = lora_fx.capture(Low(dtype), WIDE).rounding()
    assert max(rounding.values()) == torch.finfo(dtype).eps / 2
    assert min(rounding.values()) == torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize(
    "make", [lambda: Low(None), lambda: nn.TransformerEncoderLayer(12, 2, 20, 0.0, batch_first=True)]
)
def test_autocast_around_apply(make):
    """Its cache of casts keeps nothing of the numbers that a check has used."""
    torch.manual_seed(0)
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(WIDE)
        lora_fx.apply(model, Rule(where="*", rank=2), WIDE)
        assert torch.equal(model(WIDE), before)
        assert lora_fx.certify(model, WIDE)
        assert torch.equal(model(WIDE), before)
        reference.fill(model)
        torch.clear_autocast_cache()
        assert lora_fx.verify(model, lora_fx.fold(model, copy=True), WIDE)


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "a layer":
        model[1] = torch.compile(model[1], backend="eager")
    elif how == "in place":
        model[1].compile(backend="eager")
    elif how == "a forward":
        model[1].forward = torch.compile(model[1].forward, backend="eager")
    return torch.compile(model, backend="eager") if how == "the model" else model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it
@pytest.mark.parametrize("how", ["a layer", "in place", "a forward", "the model"])
def test_what_is_compiled_is_adapted(how):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12), Low(None), nn.Linear(5, 4))
    model = compiled(copy.deepcopy(base), how)
    before = model(WIDE)
    lora_fx.apply(model, Rule(where="*", rank=2), WIDE)
    assert torch.equal(model(WIDE), before)
    reference.fill(model)
    dense = copy.deepcopy(base)
    for weight, total in reference.dense_weights(model).items():
        dense.get_parameter(weight.replace("_orig_mod.", "")).data.copy_(total)
    assert lora_fx.verify(dense, model, WIDE)
    assert lora_fx.certify(model, WIDE)
    adapted = model(WIDE)
    assert lora_fx.verify(dense, lora_fx.fold(model), WIDE)
    assert torch.equal(lora_fx.unfold(model)(WIDE), adapted)
