"""Roles: right or abstained over the zoo, exact rows of every fused layout, and a reason whenever none is given."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.analysis.roles import ROLES, Label, _Labeller, label_uses
from lora_fx.graph.layout import place
from lora_fx.graph.program import Program, Weight, capture
from tests.zoo import ZOO, Parts, case, expected_roles

Q, K, V, OUT = "attention.query", "attention.key", "attention.value", "attention.output"
UP, GATE, DOWN, HEAD, OTHER = "mlp.up", "mlp.gate", "mlp.down", "lm_head", "other"

# ── the zoo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def verdicts(name: str) -> dict[str, str]:
    """weight → "right", "abstained: …" or "wrong: …" of one case."""
    model, inputs = case(name).build()
    expected = expected_roles(case(name), model)
    program = capture(model, inputs)
    labels = label_uses(program)
    found = {}
    for weight in program.weights:
        wanted = [expected[n] for n in weight.names if n in expected]
        given = [label for use in weight.uses for label in labels.get(use, ())]
        if wanted or given:
            found[weight.name] = verdict(weight, wanted, given)
    return found


def verdict(weight: Weight, wanted: list[str | Parts], given: list[Label]) -> str:
    everything = tuple(range(weight.layout.size("o")))
    rows: dict[str, set[int]] = {}
    for label in given:
        rows.setdefault(label.role, set()).update(everything if label.rows is None else label.rows)
    got = {role: tuple(sorted(own)) for role, own in rows.items()}
    parts = [w for w in wanted if isinstance(w, Parts)]
    right = {r: tuple(own) for r, own in parts[0].rows.items()} if parts else dict.fromkeys(wanted, everything)
    swapped = len(got) > 1 and not parts  # one storage in two directions: its rows mean another axis in each
    if got == right or (swapped and set(got) == set(right)):
        return "right"
    reasons = {label.reason for label in given}
    abstained = set(got) == {OTHER} and all(reasons)
    return f"{'abstained' if abstained else 'wrong'}: {sorted(got)}, not {sorted(right)} {sorted(reasons)}"


@pytest.mark.xdist_group("roles")
@pytest.mark.parametrize("name", [c.name for c in ZOO])
def test_roles_of_the_zoo(name):
    assert {weight: v for weight, v in verdicts(name).items() if v != "right"} == {}


@pytest.mark.xdist_group("roles")
def test_no_role_of_the_zoo_is_wrong_and_few_are_missing():
    found = [v for c in ZOO for v in verdicts(c.name).values()]
    assert [v for v in found if v.startswith("wrong")] == []
    assert len(found) > 1000
    assert sum(v.startswith("abstained") for v in found) <= 0.03 * len(found)


@pytest.mark.parametrize("name", ["gpt-neox", "falcon-grouped", "deepseek-v3", "gpt-oss-eager", "native-mha", "dbrx"])
def test_the_rows_of_a_use_are_partitioned(name):
    program = capture(*case(name).build())
    for use, labels in label_uses(program).items():
        assert all(label.role in ROLES and (label.role != OTHER or label.reason) for label in labels)
        if len(labels) > 1:
            own = [row for label in labels for row in label.rows]
            assert sorted(own) == sorted(set(place(use.weight.layout, use.view, use.call.sides).rows()))
            assert all(list(label.rows) == sorted(label.rows) for label in labels)


WIDE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
ONE_BERT = {"query": Q, "key": K, "value": V, "attention.output.dense": OUT, "intermediate.dense": UP}
OUTSIDE = {  # what the zoo does not have: class, config, name ending → role
    "one weight for keys and relative positions": (
        "DebertaV2Model",
        WIDE | dict(relative_attention=True, share_att_key=True, pos_att_type=["c2p", "p2c"], position_buckets=4),
        {"query_proj": Q, "key_proj": K, "value_proj": V, "attention.output.dense": OUT},
    ),
    "banded attention by in-place copies": ("LongformerModel", WIDE | dict(attention_window=4), ONE_BERT),
    "a cast to the type of the scores": (
        "XLMModel",
        dict(emb_dim=32, n_layers=1, n_heads=4, n_words=64),
        {"q_lin": Q, "k_lin": K, "v_lin": V, "out_lin": OUT, "lin1": UP, "lin2": DOWN},
    ),
    "blocks of queries and global tokens": (
        "LongT5EncoderModel",
        dict(d_model=32, d_kv=8, d_ff=56, num_layers=1, num_heads=4, vocab_size=64),
        {
            "Attention.q": Q,
            "Attention.k": K,
            "Attention.v": V,
            "Attention.o": OUT,
            "wi": UP,
            "wo": DOWN,
        },
    ),
    "an attention whose value is also convolved": ("NystromformerModel", WIDE, ONE_BERT),
}


@pytest.mark.parametrize(("name", "config", "expected"), OUTSIDE.values(), ids=OUTSIDE)
def test_architectures_outside_the_zoo(name, config, expected):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config, pad_token_id=0))
    program = capture(model.eval(), {"input_ids": torch.randint(3, 60, (2, 7))})
    labels = label_uses(program)
    for ending, role in expected.items():
        weights = [w for w in program.weights if w.name.endswith(f"{ending}.weight") and w.uses]
        assert weights, ending
        assert {label.role for w in weights for use in w.uses for label in labels[use]} == {role}, ending


# ── fused layouts: (model, the rows of its weight `fused`) ───────────────────────────────────────────────────────────


def attend(q, k, v):
    """softmax(q·kᵀ)·v of (batch, tokens, features)"""
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def rows(*blocks: tuple[str, int], times: int = 1) -> dict[str, tuple[int, ...]]:
    roles = [role for role, size in blocks for _ in range(size)] * times
    return {role: tuple(i for i, r in enumerate(roles) if r == role) for role in dict.fromkeys(roles)}


class Fused(nn.Module):
    """x → fused → `how` → out, on 12 features; added to x, then a head."""

    def __init__(self, width: int, how, between: int = 12):
        super().__init__()
        self.fused, self.out, self.head = nn.Linear(12, width), nn.Linear(between, 12), nn.Linear(12, 7)
        self.how = how

    def forward(self, x):
        return self.head(x + self.out(self.how(self.fused(x))))


def stacked(y):
    return attend(*y.chunk(3, -1))


def per_head(y):
    q, k, v = y.unflatten(-1, (2, 3, 6)).transpose(1, 2).unbind(-2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grouped(y):  # two groups: two query heads of 3, then their key, then their value
    y = y.unflatten(-1, (2, 4, 3))
    q, k, v = (t.expand(-1, -1, -1, 2, -1).flatten(2, 3).transpose(1, 2) for t in y.split((2, 1, 1), -2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def value_first(y):
    v, k, q = y.split((12, 5, 5), -1)
    return attend(q, k, v)


def key_before_query(y):  # kᵀ·q, softmax over the rows
    q, k, v = y.split((5, 5, 12), -1)
    return (k @ q.transpose(-2, -1)).softmax(-2).transpose(-2, -1) @ v


def einsum_key_first(y):
    q, k, v = y.split((5, 5, 12), -1)
    return torch.einsum("bkq,bkd->bqd", torch.einsum("bkd,bqd->bkq", k, q).softmax(1), v)


def masked_in_place(y):
    q, k, v = y.split((5, 5, 12), -1)
    scores = (q @ k.mT).div_(2)
    scores.masked_fill_(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    return F.dropout(scores.softmax(-1), 0.1, False) @ v


def copied_in_place(y):  # the key is put together in an empty tensor
    a, q, b, v = y.split((2, 5, 3, 12), -1)
    k = torch.empty_like(q)
    k[..., :2] = a
    k[..., 2:] = b
    return attend(q, k, v)


def turned(y):  # a rotary embedding of half the features
    q, k, v = y.split((4, 4, 12), -1)
    cos, sin = torch.linspace(0, 1, 7).cos()[:, None], torch.linspace(0, 1, 7).sin()[:, None]
    q, k = (torch.cat((t[..., :2] * cos + t[..., :2].flip(-1) * sin, t[..., 2:]), -1) for t in (q, k))
    return attend(q, k, v)


def with_a_sink(y):  # one more column in the softmax, as GPT-OSS has it
    q, k, v = y.split((5, 5, 12), -1)
    scores = torch.cat((q @ k.mT, torch.zeros(2, 7, 1)), -1)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def with_a_rest(y):  # the last features are read by nobody
    return attend(*y[..., :36].chunk(3, -1))


def parallel_mlp(y):  # one weight for attention and MLP
    q, k, v, up = y.split((4, 4, 6, 6), -1)
    return torch.cat((attend(q, k, v), F.gelu(up)), -1)


def gate_first(y):
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def alternating(y):
    gate, up = y[..., ::2].clamp(max=7), y[..., 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def tanh_gelu(y):
    gate, up = y.split((12, 12), -1)
    return up * (0.5 * gate * (1 + torch.tanh(0.8 * (gate + 0.044715 * gate.pow(3)))))


LAYOUTS = [
    (36, stacked, rows((Q, 12), (K, 12), (V, 12))),
    (36, per_head, rows((Q, 6), (K, 6), (V, 6), times=2)),
    (24, grouped, rows((Q, 6), (K, 3), (V, 3), times=2)),
    (22, value_first, rows((V, 12), (K, 5), (Q, 5))),
    (22, key_before_query, rows((Q, 5), (K, 5), (V, 12))),
    (22, einsum_key_first, rows((Q, 5), (K, 5), (V, 12))),
    (22, masked_in_place, rows((Q, 5), (K, 5), (V, 12))),
    (22, copied_in_place, rows((K, 2), (Q, 5), (K, 3), (V, 12))),
    (20, turned, rows((Q, 4), (K, 4), (V, 12))),
    (22, with_a_sink, rows((Q, 5), (K, 5), (V, 12))),
    (39, with_a_rest, rows((Q, 12), (K, 12), (V, 12), (OTHER, 3))),
    (24, gate_first, rows((GATE, 12), (UP, 12))),
    (24, alternating, rows((GATE, 1), (UP, 1), times=12)),
    (24, tanh_gelu, rows((GATE, 12), (UP, 12))),
    (24, lambda y: F.glu(y, -1), rows((UP, 12), (GATE, 12))),
    (24, lambda y: F.glu(y.mT, 1).mT, rows((UP, 12), (GATE, 12))),
]  # fmt: skip


def labels_of(model: nn.Module, inputs, name: str = "fused.weight") -> list[tuple[Label, ...]]:
    program = capture(model.eval(), inputs)
    labels = label_uses(program)
    return [labels[use] for use in program.weight(name).uses]


def roles_of(model: nn.Module, inputs) -> dict[str, str]:
    program = capture(model.eval(), inputs)
    labels = label_uses(program)
    return {w.name: " ".join(label.role for use in w.uses for label in labels[use]) for w in program.weights}


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 7, 12)))


@pytest.mark.parametrize(("width", "how", "expected"), LAYOUTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_fused_weight_is_split_exactly(width, how, expected):
    (labels,) = labels_of(Fused(width, how), x())
    assert {label.role: label.rows for label in labels} == expected


@pytest.mark.parametrize("how", [gate_first, alternating, tanh_gelu])
def test_the_matrix_behind_a_fused_gate_is_mlp_down(how):
    assert roles_of(Fused(24, how), x())["out.weight"] == DOWN


def test_attention_and_mlp_in_one_weight():
    (labels,) = labels_of(Fused(20, parallel_mlp), x())
    assert {label.role: label.rows for label in labels[:3]} == rows((Q, 4), (K, 4), (V, 6))
    assert labels[3].role == OTHER and labels[3].rows == tuple(range(14, 20))
    assert "attention" in labels[3].reason  # its way on is through attention.output, so it is no up of an mlp.down


@pytest.mark.parametrize("form", ["x @ w", "w @ xᵀ", "einsum"])
def test_rows_are_those_of_the_layout_whatever_the_form(form):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            shape = {"x @ w": (12, 30), "w @ xᵀ": (30, 12), "einsum": (12, 2, 15)}[form]
            self.fused, self.out = nn.Parameter(torch.randn(shape)), nn.Linear(10, 12)

        def forward(self, x):
            if form == "einsum":  # head 0: q k v, head 1: q k v
                q, k, v = torch.einsum("bsi,iho->bsho", x, self.fused).split(5, -1)
                y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
            else:
                y = attend(*(x @ self.fused if form == "x @ w" else (self.fused @ x.mT).mT).chunk(3, -1))
            return x + self.out(y)

    (labels,) = labels_of(Raw(), x(), "fused")
    expected = rows((Q, 5), (K, 5), (V, 5), times=2) if form == "einsum" else rows((Q, 10), (K, 10), (V, 10))
    assert {label.role: label.rows for label in labels} == expected


class Shuffled(nn.Module):
    """The features change places by an index that only the buffer knows."""

    def __init__(self):
        super().__init__()
        self.fused, self.out = nn.Linear(12, 30), nn.Linear(10, 12)
        self.register_buffer("order", torch.tensor([*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]))

    def forward(self, x):
        return x + self.out(attend(*self.fused(x)[..., self.order].chunk(3, -1)))


def test_an_index_over_features_is_taken_from_the_model_and_left_as_it_is():
    model = Shuffled()
    order, state = model.order.clone(), torch.get_rng_state()
    program = capture(model.eval(), x_fixed := torch.ones(2, 7, 12))
    (labels,) = (label_uses(program)[use] for use in program.weight("fused.weight").uses)
    assert {label.role: label.rows for label in labels} == rows((Q, 1), (K, 1), (V, 1), times=10)
    assert torch.equal(model.order, order) and torch.equal(torch.get_rng_state(), state) and x_fixed.eq(1).all()


def test_a_use_that_sees_a_slice_names_the_rows_it_sees():
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    labels = labels_of(model, (x(2, 7, 16), other := x(2, 5, 16), other), "in_proj_weight")
    q, kv = sorted(labels, key=len)
    assert q == (Label(Q, tuple(range(16))),)
    assert {label.role: label.rows for label in kv} == {K: tuple(range(16, 32)), V: tuple(range(32, 48))}


# ── what two matrices are, not fused ─────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    """x + how(the linears a, b, c, d of x), then a head."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 10) for _ in range(3))
        self.d, self.head = nn.Linear(10, 12), nn.Linear(12, 7)
        self.how = how

    def forward(self, x):
        return self.head(x + self.how(self, x))


def block(how) -> dict[str, tuple[str, str]]:
    """name → (role, reason) of each weight used."""
    program = capture(Block(how).eval(), x())
    labels = label_uses(program)
    return {
        use.weight.name[0]: (label.role, label.reason)
        for use in program.uses
        if use.multiplies
        for label in labels[use]
    }


MLPS = {
    "squared relu": lambda m, x: m.d(F.relu(m.a(x)).square()),
    "relu as a clamp": lambda m, x: m.d(m.a(x).clamp(min=0)),
    "silu spelled out": lambda m, x: m.d((y := m.a(x)) * torch.sigmoid(y)),
    "quick gelu": lambda m, x: m.d((y := m.a(x)) * torch.sigmoid(1.702 * y)),
    "gelu by erf": lambda m, x: m.d(0.5 * (y := m.a(x)) * (1 + torch.erf(y / 2**0.5))),
    "gelu by tanh": lambda m, x: m.d(0.5 * (y := m.a(x)) * (1 + torch.tanh(0.8 * (y + 0.044715 * y**3)))),
    "a norm within": lambda m, x: m.d(F.layer_norm(F.gelu(m.a(x)), (10,))),
    "scaled by a scalar gate": lambda m, x: m.d(F.gelu(m.a(x)) * torch.sigmoid(m.b(x)[..., :1])),
}


@pytest.mark.parametrize("how", MLPS.values(), ids=MLPS)
def test_an_ungated_mlp_has_an_up_and_no_gate(how):
    found = block(how)
    assert (found["a"][0], found["d"][0], found["head"[0]][0]) == (UP, DOWN, HEAD)
    assert found.get("b", (OTHER,))[0] == OTHER


def test_the_factor_beside_the_nonlinearity_is_up():
    found = block(lambda m, x: m.d(m.b(x) * F.silu(m.a(x))))
    assert {n: role for n, (role, _) in found.items()} == {"a": GATE, "b": UP, "d": DOWN, "h": HEAD}


def test_heads_and_poolers_are_no_mlp():
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7))
    assert roles_of(model, x()) == {"0.weight": OTHER, "2.weight": HEAD}


def test_a_convolution_that_keeps_features_apart_is_looked_through():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 7)
            self.local = nn.Conv1d(10, 10, 3, padding=1, groups=10)

        def forward(self, x):
            return self.head(x + self.down(F.gelu(self.local(self.up(x).mT).mT)))

    expected = {"up.weight": UP, "local.weight": "conv", "down.weight": DOWN, "head.weight": HEAD}
    assert roles_of(Mixed(), x()) == expected


# ── abstention: `other`, and why ─────────────────────────────────────────────────────────────────────────────────────


def linear_attention(m, x):
    return m.d(F.elu(m.a(x)) @ (m.b(x).mT @ m.c(x)))


ABSTENTIONS = {
    "one matrix is query and key": ("a", "same features feed", lambda m, x: m.d(attend(y := m.a(x), y, m.c(x)))),
    "attention without a softmax": ("a", "no softmax attention", linear_attention),
    "behind it": ("d", "comes out of a product of activations", linear_attention),
    "both factors are bent": ("d", "either factor", lambda m, x: m.d(torch.sigmoid(m.a(x)) * torch.tanh(m.b(x)))),
    "a gate on an attention": (
        "c", "gates the result", lambda m, x: m.d(torch.sigmoid(m.c(x)) * attend(m.a(x), m.b(x), m.b(x)))),
    "dead": ("a", "reaches neither", lambda m, x: (m.a(x), m.d(m.b(x)))[1]),
    "only added": ("d", "added to the residual stream", lambda m, x: m.d(m.a(x))),
    "nothing": ("a", "no attention, MLP, router", lambda m, x: m.d(m.a(x))),
    "the output of one attention, the query of the next": (
        "d", "by what feeds it", lambda m, x: attend(m.d(attend(m.a(x), m.b(x), m.c(x))), F.pad(m.b(x), (0, 2)), x)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "reason", "how"), ABSTENTIONS.values(), ids=ABSTENTIONS)
def test_abstaining_says_why(name, reason, how):
    role, why = block(how)[name]
    assert role == OTHER and reason in why, (role, why)


def test_ops_that_hide_their_products_are_other():
    program = capture(nn.LSTM(12, 10, batch_first=True).eval(), x())
    for labels in label_uses(program).values():
        assert [(label.role, label.rows) for label in labels] == [(OTHER, None)]
        assert "lstm multiplies inside one op" in labels[0].reason


def test_a_fused_weight_whose_features_are_no_rows_is_other():
    class Tied(nn.Module):
        """The table is looked up, so a row is a token; the attention reads its other axis."""

        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(36, 12), nn.Linear(12, 12)

        def forward(self, ids):
            y = self.table(ids)
            return y + self.out(attend(*F.linear(y, self.table.weight).chunk(3, -1)))

    embedding, fused = labels_of(Tied(), torch.randint(36, (2, 7)), "table.weight")
    assert embedding == (Label("embedding", None),)
    assert fused[0].role == OTHER and fused[0].rows is None and "no rows of the weight" in fused[0].reason


def test_positions_are_other_unless_their_weight_is_the_query_itself():
    class Relative(nn.Module):
        def __init__(self, shared: bool):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
            self.register_buffer("table", torch.randn(7, 12))
            self.r = self.k if shared else nn.Linear(12, 12)

        def forward(self, x):
            q = self.q(x)
            scores = q @ self.k(x).mT + q @ self.r(self.table).mT
            return x + self.out(scores.softmax(-1) @ self.v(x))

    (labels,) = labels_of(Relative(shared=False), x(), "r.weight")
    assert labels[0].role == OTHER and "table of positions" in labels[0].reason
    assert [labels[0].role for labels in labels_of(Relative(shared=True), x(), "k.weight")] == [K, K]
    assert roles_of(Relative(shared=False), x())["q.weight"] == Q


# ── families that look like something else: attention by autocorrelation, and time mixing by receptance ──────────────


class Mixer(nn.Module):
    """x + how(…), then an MLP, then a head. Beside linears it has what decays, shifts and biases over time."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(12, 12) for _ in range(5))
        self.fused, self.low, self.high = nn.Linear(12, 36), nn.Linear(12, 4), nn.Linear(4, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 7)
        self.first, self.decay = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.share, self.bias = nn.Parameter(torch.rand(3, 1, 1, 12)), nn.Parameter(torch.randn(7, 7))
        self.norms, self.groups = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(12)]), nn.GroupNorm(2, 12)
        self.how = how

    def forward(self, x):
        x = x + self.how(self, self.norms[0](x))
        return self.head(x + self.down(F.gelu(self.up(self.norms[1](x)))))

    def shifted(self, x):
        """The inputs of a, b and c: each token mixed with the one before it."""
        before = F.pad(x, (0, 0, 1, -1))
        return [x * share + before * (1 - share) for share in self.share.sigmoid()]


def lags(m, q, k, v):
    """By a Fourier transform, the two strongest lags, and a gather."""
    strength = torch.fft.irfft(torch.fft.rfft(q.mT) * torch.fft.rfft(k.mT).conj(), n=7).mean(1)
    weights, lag = strength.topk(2, -1)
    at = (torch.arange(7)[None, :, None] + lag[:, None, :]) % 7
    rolled = torch.gather(v[:, :, None].expand(-1, -1, 2, -1), 1, at[..., None].expand(-1, -1, -1, 12))
    return m.d((rolled * weights.softmax(-1)[:, None, :, None]).sum(2))


def lags_by_rolling(m, x):
    q, k, v = m.a(x), m.b(x), m.c(x)
    weights, lag = torch.topk(torch.stack([(q * k.roll(t, 1)).mean((1, 2)) for t in range(7)], -1), 2)
    twice, out = torch.cat([v, v], 1), 0
    for j, weight in enumerate(weights.softmax(-1).unbind(-1)):
        out = (
            out
            + twice.gather(1, (torch.arange(7) + lag[:, j : j + 1])[..., None].expand(-1, -1, 12))
            * weight[:, None, None]
        )
    return m.d(out)


def lags_by_einsum(m, x):
    q, k, v = (torch.fft.fft(linear(x), dim=1) for linear in (m.a, m.b, m.c))
    strength = torch.fft.ifft(torch.einsum("btd,btd->btd", q, k.conj()), dim=1).real.mean(-1)
    rolled = torch.stack([torch.fft.ifft(v, dim=1).real.roll(n, 1) for n in range(3)], 1)
    return m.d(torch.einsum("bk,bktd->btd", strength.topk(3, -1)[0].softmax(-1), rolled))


def lags_by_head(m, x):
    q, k, v = (linear(x).view(2, 7, 2, 6).permute(0, 2, 3, 1) for linear in (m.a, m.b, m.c))
    spectrum = torch.fft.rfft(q, dim=-1) * torch.conj(torch.fft.rfft(k, dim=-1))
    mean = torch.fft.irfft(spectrum, n=7, dim=-1).mean((1, 2))
    lag = mean.mean(0).topk(2)[1]
    weights = mean.index_select(-1, lag).softmax(-1)
    parts = (
        torch.cat([v, v], -1).index_select(-1, torch.arange(7) + lag[j]) * weights[:, j, None, None, None]
        for j in (0, 1)
    )
    return m.d(sum(parts).permute(0, 3, 1, 2).flatten(2))


def strongest_lag(m, x):
    spectrum = torch.fft.rfft(m.a(x), dim=1) * torch.fft.rfft(m.b(x), dim=1).conj()
    lag = torch.fft.irfft(spectrum, n=7, dim=1).mean(-1).argmax(-1)
    at = (torch.arange(7) + lag[:, None])[..., None].expand(-1, -1, 12)
    return m.d(torch.cat([m.c(x)] * 2, 1).gather(1, at))


def strongest_frequencies(m, x):
    y = m.a(x)
    return m.d(y * torch.fft.rfft(y, dim=1).abs().mean(-1).topk(2, -1)[0].softmax(-1).sum(-1)[:, None, None])


def receptance_over_a_loop(m, x):
    k, v, r = (linear(y) for linear, y in zip((m.a, m.b, m.c), m.shifted(x), strict=True))
    above = below = torch.zeros(2, 12)
    out = []
    for t in range(7):
        now, later, decay = torch.exp(m.first + k[:, t]), k[:, t].exp(), torch.exp(-m.decay.exp())
        out.append((above + now * v[:, t]) / (below + now))
        above, below = decay * above + later * v[:, t], decay * below + later
    return m.d(r.sigmoid() * torch.stack(out, 1))


def receptance_in_place(m, x):
    k, v, r = (linear(y) for linear, y in zip((m.a, m.b, m.c), m.shifted(x), strict=True))
    out, above, below, most = torch.zeros_like(k), torch.zeros(2, 12), torch.zeros(2, 12), torch.full((2, 12), -1e38)
    for t in range(7):
        top = torch.maximum(most, m.first + k[:, t])
        old, new = torch.exp(most - top), torch.exp(m.first + k[:, t] - top)
        out[:, t] = (old * above + new * v[:, t]) / (old * below + new)
        top = torch.maximum(most - m.decay.exp(), k[:, t])
        old, new = torch.exp(most - m.decay.exp() - top), torch.exp(k[:, t] - top)
        above, below, most = old * above + new * v[:, t], old * below + new, top
    return m.d(torch.sigmoid(r) * out)


def receptance_of_one_matrix(m, x):
    r, k, v = m.fused(x).chunk(3, -1)
    return m.d(r.sigmoid() * ((k.exp() * v).cumsum(1) / k.exp().cumsum(1)))


def receptance_by_a_matrix_of_decays(m, x):
    k, v, decay = m.a(x).exp(), m.b(x), m.bias.tril().exp()
    return m.d(m.c(x).sigmoid() * ((decay @ (k * v)) / (decay @ k)))


def state_of_outer_products(m, x, decays=None, gate=True):
    k, v, r = (linear(y).view(2, 7, 2, 6) for linear, y in zip((m.a, m.b, m.c), m.shifted(x), strict=True))
    decay = (m.decay if decays is None else m.decay + decays(x)).exp().neg().exp().expand(2, 7, 12).view(2, 7, 2, 6)
    state, out = torch.zeros(2, 2, 6, 6), []
    for t in range(7):
        own = k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((r[:, t, :, :, None] * (state + m.first.view(2, 6, 1) * own)).sum(-2))
        state = decay[:, t][..., None] * state + own
    y = m.groups(torch.stack(out, 1).flatten(2).mT).mT
    return m.d(y * F.silu(m.e(x)) if gate else y)


def state_of_matmuls(m, x):
    k, v, r = (linear(y).view(2, 7, 2, 6) for linear, y in zip((m.a, m.b, m.c), m.shifted(x), strict=True))
    state, out = torch.zeros(2, 2, 6, 6), []
    for t in range(7):
        own = k[:, t, :, :, None] @ v[:, t, :, None, :]
        out.append((r[:, t, :, None] @ (state + m.first.view(2, 6, 1) * own)).squeeze(-2))
        state = m.decay.exp().view(2, 6, 1) * state + own
    return m.d(m.groups(torch.stack(out, 1).flatten(2).mT).mT * torch.sigmoid(m.e(x)))


def scanned(first, steps):
    """The states of s ← 0.9 s + step."""
    states = [first]
    for step in steps:
        states.append(0.9 * states[-1] + step)
    return torch.stack(states[1:], 1)


MIXERS = {
    "lags": lambda m, x: lags(m, m.a(x), m.b(x), m.c(x)),
    "lags of one matrix": lambda m, x: lags(m, *m.fused(x).chunk(3, -1)),
    "lags by rolling": lags_by_rolling,
    "lags by an einsum": lags_by_einsum,
    "lags of heads": lags_by_head,
    "the strongest lag": strongest_lag,
    "the strongest frequencies": strongest_frequencies,
    "receptance over a loop": receptance_over_a_loop,
    "receptance in place": receptance_in_place,
    "receptance of one matrix": receptance_of_one_matrix,
    "receptance by cumulative sums": lambda m, x: m.d(
        m.c(x).sigmoid() * ((m.a(x).exp() * m.b(x)).cumsum(1) / m.a(x).exp().cumsum(1))),
    "receptance by a matrix of decays": receptance_by_a_matrix_of_decays,
    "receptance of a softmax over tokens": lambda m, x: m.d(
        m.c(x).sigmoid() * (m.a(x).softmax(1) * m.b(x)).sum(1, keepdim=True)),
    "a state of outer products": state_of_outer_products,
    "the same with decays of the data": lambda m, x: state_of_outer_products(m, x, lambda y: m.high(m.low(y).tanh())),
    "the same without a gate": lambda m, x: state_of_outer_products(m, x, gate=False),
    "a state of matmuls": state_of_matmuls,
    "a scan of f(k)·v": lambda m, x: m.d(scanned(torch.zeros(2, 12), (F.silu(m.a(x)) * m.b(x)).unbind(1))),
    "cumulative sums of f(k)·v": lambda m, x: m.d(
        (F.elu(m.c(x)) + 1) * ((F.elu(m.a(x)) + 1) * m.b(x)).cumsum(1) / ((F.elu(m.a(x)) + 1).cumsum(1))),
    "a bent sum of k·v": lambda m, x: m.d(F.silu((m.a(x) * m.b(x)).cumsum(1))),
    "a bent quotient": lambda m, x: m.d(
        torch.tanh((m.a(x).exp() * m.b(x)).cumsum(1) / m.a(x).exp().cumsum(1)) * m.c(x)),
}  # fmt: skip


@pytest.mark.parametrize("how", MIXERS.values(), ids=MIXERS)
def test_what_mixes_tokens_is_no_router_and_no_mlp(how):
    program = capture(Mixer(how).eval(), x())
    labels = label_uses(program)
    found = {u.weight.name.removesuffix(".weight"): labels[u][0] for u in program.uses if u.multiplies}
    assert [found.pop(name).role for name in ("up", "down", "head")] == [UP, DOWN, HEAD]
    assert {label.role for label in found.values()} == {OTHER} and all(label.reason for label in found.values())
    told = " ".join(label.reason for label in found.values())
    assert "product of activations that is no softmax attention" in told


def test_a_gated_mlp_of_tokens_that_were_mixed_before_is_one():
    """Token shift and a hidden norm do not hide it; what a receptance does to its output does not either."""

    def gated(m, x):
        k, v, r = m.shifted(x)
        hidden = F.silu(m.a(k)) * m.b(v)
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        return torch.sigmoid(m.c(r)) * m.d(hidden - hidden.mean(-1, keepdim=True))

    program = capture(Mixer(gated).eval(), x())
    labels = label_uses(program)
    found = {u.weight.name[0]: labels[u][0].role for u in program.uses if u.multiplies and len(u.weight.name) == 8}
    assert found == {"a": GATE, "b": UP, "c": OTHER, "d": DOWN}


class Streams(nn.Module):
    """Several residual streams, mixed by weights made of them, of which the output is a weighed sum."""

    def __init__(self):
        super().__init__()
        self.mix, self.last, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 9)

    def forward(self, x):
        streams = torch.stack([x, 2 * x, 3 * x], -2)
        among, own = self.mix(x).split([9, 3], -1)
        mixed = among.unflatten(-1, (3, 3)) @ streams + own.unsqueeze(-1) * self.last(x).unsqueeze(-2)
        weights = mixed.square().mean(-1, keepdim=True)
        return (weights.mT @ mixed).squeeze(-2), self.head(x)


def test_what_is_mixed_before_it_is_returned_is_no_head():
    model = Streams()
    found = {use.weight.name: label for use, (label,) in label_uses(capture(model, x())).items()}
    assert found["head.weight"].role == "lm_head"
    assert found["last.weight"].role == "other" and "product of activations" in found["last.weight"].reason


def test_libraries_that_mix_so():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=56)
    config = transformers.RwkvConfig(**sizes, rescale_every=0)  # else its forward divides two of its weights
    program = capture(transformers.RwkvModel(config).eval(), {"input_ids": torch.arange(14).view(2, 7)})
    labels = label_uses(program)
    found = {u.weight.name: labels[u][0].role for u in program.uses if u.multiplies}
    assert {role for name, role in found.items() if "attention" in name} == {OTHER}
    assert {role for name, role in found.items() if "feed_forward.key" in name} == {UP}


# ── on meta, at any size, in linear time ─────────────────────────────────────────────────────────────────────────────


def on_meta(make, *shape: int):
    with torch.device("meta"):
        return make().eval(), torch.empty(*shape)


def test_wide_models_on_meta_are_split_on_shorter_sequences():
    model, inputs = on_meta(lambda: Wide(8192), 4, 512, 8192)
    (labels,) = labels_of(model, inputs)
    assert {label.role: (label.rows[0], len(label.rows)) for label in labels} == {
        Q: (0, 8192), K: (8192, 8192), V: (16384, 8192)
    }  # fmt: skip


def test_what_takes_too_much_memory_is_other():
    model, inputs = on_meta(lambda: Wide(4096), 1, 12288, 4096)  # as many tokens as features: which is which is open
    ((label,),) = labels_of(model, inputs)
    assert label.role == OTHER and "GiB: pass shorter example inputs" in label.reason


def test_an_index_without_a_value_is_other():
    model, inputs = on_meta(Shuffled, 2, 7, 12)
    ((label,),) = labels_of(model, inputs)
    assert label.role == OTHER and "meta device" in label.reason


class Wide(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fused, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 128)).transpose(1, 2) for t in self.fused(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def effort(layers: int) -> tuple[int, int]:
    """Nodes looked at, and runs of a part of the graph."""
    blocks = [Fused(36, per_head) for _ in range(layers)]
    for one in blocks:
        one.head = nn.Linear(12, 12)
    labeller = _Labeller(capture(nn.Sequential(*blocks).eval(), x()))
    labeller.labels()
    return labeller.flow.visits, labeller.flow.splitter.runs


def test_the_effort_is_linear_and_equal_layers_are_run_once():
    (few, runs), (many, same) = effort(8), effort(32)
    assert many <= 4.1 * few
    assert runs == same == 3


def test_without_example_inputs_there_are_no_labels():
    assert label_uses(Program(nn.Linear(2, 3), None, ())) == {}
