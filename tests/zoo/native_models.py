"""Torch-native odd ones: each shows one way a weight is used that a module swap or a naive rewrite gets wrong."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo import Case, fresh, fused

QKV = ("attention.query", "attention.key", "attention.value")


def weight(*shape: int) -> nn.Parameter:
    """A raw parameter; `fresh` draws its values."""
    return nn.Parameter(torch.empty(*shape))


class Chain(nn.Module):
    """Two raw matmuls in (in, out) layout; the second reads the first: the trap of stale inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = weight(12, 20), weight(20, 9)

    def forward(self, x):
        return x @ self.first @ self.second


class EinsumAttention(nn.Module):
    """Attention as equations: (in, heads, dim) in, (heads, dim, out) out."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = weight(14, 3, 4), weight(14, 3, 4), weight(14, 3, 5)
        self.output = weight(3, 5, 10)
        self.head = nn.Linear(10, 7)

    def forward(self, x):
        q, k, v = (torch.einsum("bsi,ihd->bhsd", x, w) for w in (self.query, self.key, self.value))
        p = (torch.einsum("bhqd,bhkd->bhqk", q, k) / 2).softmax(-1)
        return self.head(torch.einsum("bhqk,bhkd,hdo->bqo", p, v, self.output))


class SlicedGate(nn.Module):
    """One (in, out) weight read through two slices: a gate beside its factor."""

    def __init__(self):
        super().__init__()
        self.both, self.down, self.head = weight(12, 40), nn.Linear(20, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.head(x + self.down(F.silu(x @ self.both[:, :20]) * (x @ self.both[:, 20:])))


class SlicedAttention(nn.Module):
    """One (in, out) weight read through three slices of unequal width, into SDPA."""

    def __init__(self):
        super().__init__()
        self.qkv, self.output, self.head = weight(14, 44), nn.Linear(12, 14), nn.Linear(14, 7)

    def forward(self, x):
        q, k, v = x @ self.qkv[:, :16], x @ self.qkv[:, 16:32], x @ self.qkv[:, 32:]
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.output(y.transpose(1, 2).flatten(2)))


class Bypassed(nn.Module):
    """The parent multiplies with its child's weight; the child's own forward never runs."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 7)

    def forward(self, x):
        y = F.relu(F.linear(x, self.up.weight, self.up.bias))
        return F.linear(x + F.linear(y, self.down.weight, self.down.bias), self.head.weight)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 20, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, 7)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Thrice(nn.Module):
    """One module called three times: one adapter, three uses."""

    def __init__(self):
        super().__init__()
        self.again, self.head = nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.head(self.again(self.again(self.again(x)).tanh()))


class TwoNames(nn.Module):
    """One Linear under two names, both used."""

    def __init__(self):
        super().__init__()
        self.one = self.other = nn.Linear(12, 20)
        self.head = nn.Linear(20, 7)

    def forward(self, x):
        return self.head(self.one(x) - self.other(x.flip(-1)))


class SharedParameter(nn.Module):
    """Two modules, two biases, one weight."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 7)
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.head(self.left(x) - self.right(x.flip(-1)))


class Tied(nn.Module):
    """A lookup and a matmul on one storage."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(23, 12), nn.Linear(12, 12), nn.Linear(12, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).tanh().cumsum(1))


class Branch(nn.Module):
    """The data decide which of two uses of a weight runs; a capture sees one of them."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(12, 20), nn.Linear(20, 7)

    def forward(self, x):
        if x.sum() > 0:
            return self.head(self.mix(x))
        return self.head(2 * self.mix(-x))


class Experts(nn.Module):
    """An eager loop over (experts, out, in) weights; each expert multiplies the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.router, self.head = nn.Linear(12, 4), nn.Linear(12, 7)
        self.up, self.down = weight(4, 20, 12), weight(4, 12, 20)

    def forward(self, x):
        shares, chosen = self.router(x).softmax(-1).topk(2)
        y = x
        for e in range(4):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            z = F.linear(F.gelu(F.linear(x[token], self.up[e])), self.down[e])
            y = y.index_add(0, token, z * shares[token, slot, None])
        return self.head(y)


class Batched(nn.Module):
    """bmm with the weight on either side, baddbmm with alpha and beta."""

    def __init__(self):
        super().__init__()
        self.right, self.left = weight(3, 12, 20), weight(3, 8, 5)
        self.last, self.bias = weight(3, 20, 9), weight(3, 1, 9)

    def forward(self, x):
        y = torch.bmm(self.left, torch.bmm(x, self.right))
        return torch.baddbmm(self.bias, y, self.last, beta=0.5, alpha=2)


class Addmm(nn.Module):
    """addmm with alpha and beta, the weight on the right, then on the left."""

    def __init__(self):
        super().__init__()
        self.right, self.left, self.bias = weight(12, 20), weight(9, 20), nn.Parameter(torch.zeros(20))
        self.column = nn.Parameter(torch.zeros(9))

    def forward(self, x):
        y = torch.addmm(self.bias, x, self.right, beta=0.5, alpha=2)
        return torch.addmm(self.column[:, None], self.left, y.T, beta=3, alpha=0.5).T


class Bilinear(nn.Module):
    """A weight with two inputs: no branch on one of them says what W + s·B·A says."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Bilinear(12, 10, 9), nn.Linear(9, 7)

    def forward(self, x, y):
        return self.head(self.mix(x, y))


class Residual(nn.Sequential):
    """x + f(x)"""

    def forward(self, x):
        return x + super().forward(x)


class GatedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class InAList(nn.Module):
    """Weights that no module of their own holds."""

    def __init__(self):
        super().__init__()
        self.chain = nn.ParameterList([weight(12, 20), weight(20, 15), weight(15, 9)])

    def forward(self, x):
        for w in self.chain:
            x = x @ w
        return x


def row(name, model, inputs, roles):
    """`model` and `inputs` are lambdas: nothing is built before `Case.build`."""
    return Case(f"native-{name}", "native", fresh(lambda: (model(), inputs())), roles)


def x(*shape):
    return lambda: torch.randn(*shape)


def ids(*shape, below):
    return lambda: torch.randint(below, shape)


PACKED = fused(*((role, 16) for role in QKV))  # in_proj_weight of nn.MultiheadAttention: q, k, v stacked
LAYER = {"*in_proj_weight": PACKED, "*.out_proj.weight": "attention.output",
         "*.linear1.weight": "mlp.up", "*.linear2.weight": "mlp.down"}  # fmt: skip
HEAD = {"head.weight": "lm_head"}

CASES = (
    row("chain", Chain, x(2, 7, 12), {"first": "other", "second": "lm_head"}),
    row("einsum-attention", EinsumAttention, x(2, 7, 14),
        {"query": QKV[0], "key": QKV[1], "value": QKV[2], "output": "attention.output"} | HEAD),
    row("sliced-gate", SlicedGate, x(2, 7, 12),
        {"both": fused(("mlp.gate", 20), ("mlp.up", 20)), "down.weight": "mlp.down"} | HEAD),
    row("sliced-attention", SlicedAttention, x(2, 7, 14),
        {"qkv": fused((QKV[0], 16), (QKV[1], 16), (QKV[2], 12)), "output.weight": "attention.output"} | HEAD),
    row("bypassed-linear", Bypassed, x(2, 7, 12), {"up.weight": "mlp.up", "down.weight": "mlp.down"} | HEAD),
    row("mha", lambda: nn.MultiheadAttention(16, 4, batch_first=True), lambda: (torch.randn(2, 7, 16),) * 3,
        {"in_proj_weight": PACKED, "out_proj.weight": "attention.output"}),
    row("mha-kdim", lambda: nn.MultiheadAttention(16, 4, kdim=10, vdim=14, add_bias_kv=True, batch_first=True),
        lambda: (torch.randn(2, 7, 16), torch.randn(2, 5, 10), torch.randn(2, 5, 14)),
        {"q_proj_weight": QKV[0], "k_proj_weight": QKV[1], "v_proj_weight": QKV[2],
         "out_proj.weight": "attention.output", "bias_?": None}),
    row("encoder", lambda: nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 28, batch_first=True), 2), nn.Linear(16, 7)),
        x(2, 7, 16), LAYER | {"1.weight": "lm_head"}),
    row("decoder", lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 4, 28, activation="gelu", norm_first=True), 2, nn.LayerNorm(16)),
        lambda: (torch.randn(7, 2, 16), torch.randn(5, 2, 16)), LAYER),
    row("lstm", Recurrent, x(2, 7, 12), {"lstm.*": "other"} | HEAD),
    row("called-thrice", Thrice, x(2, 7, 12), {"again.weight": "other"} | HEAD),
    row("two-names", TwoNames, x(2, 7, 12), {"one.weight": "other", "other.weight": "other"} | HEAD),
    row("shared-parameter", SharedParameter, x(2, 7, 12), {"left.weight": "other", "right.weight": "other"} | HEAD),
    row("tied", Tied, ids(2, 7, below=23), {"embed.weight": "embedding", "mix.weight": "other"} | HEAD),
    row("branch", Branch, x(2, 7, 12), {"mix.weight": "other"} | HEAD),
    row("conv1d", lambda: nn.Sequential(
            nn.Conv1d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular"), nn.Tanh(),
            nn.Conv1d(8, 10, 4, padding="same", dilation=2), nn.Tanh(),
            nn.Conv1d(10, 5, 3, padding=1, padding_mode="replicate", bias=False)),
        x(2, 6, 15), {"*": "conv"}),
    row("conv2d", lambda: nn.Sequential(
            nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, padding_mode="reflect"),
            nn.Tanh(), nn.Conv2d(8, 10, (3, 4), padding="same", groups=2, padding_mode="circular"), nn.Tanh(),
            nn.Conv2d(10, 5, 3, stride=2, padding="valid", bias=False)),
        x(2, 6, 11, 9), {"*": "conv"}),
    row("conv3d", lambda: nn.Sequential(
            nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 2), groups=2), nn.Tanh(),
            nn.Conv3d(6, 5, (3, 2, 1), padding="same", padding_mode="replicate")),
        x(2, 4, 5, 6, 7), {"*": "conv"}),
    row("deconv", lambda: nn.Sequential(
            nn.ConvTranspose1d(6, 8, 3, stride=3, padding=1, output_padding=2, groups=2, dilation=2), nn.Tanh(),
            nn.Unflatten(2, (4, 5)),
            nn.ConvTranspose2d(8, 6, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0), groups=2)),
        x(2, 6, 6), {"*": "conv"}),
    row("batchnorm", lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            Residual(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)),
        x(2, 3, 10, 8), {"7.weight": "lm_head", "*": "conv"}),
    row("experts", Experts, x(24, 12), {"router.weight": "router", "up": "mlp.up", "down": "mlp.down"} | HEAD),
    row("bmm", Batched, x(3, 5, 12), {"right": "other", "left": "other", "last": "lm_head", "bias": None}),
    row("addmm", Addmm, x(6, 12), {"right": "other", "left": "lm_head"}),
    row("bilinear", Bilinear, lambda: (torch.randn(2, 7, 12), torch.randn(2, 7, 10)), {"mix.weight": "other"} | HEAD),
    row("padding", lambda: nn.Sequential(nn.Embedding(23, 12, padding_idx=3), nn.Tanh(), nn.Linear(12, 9)),
        lambda: torch.tensor([[3, 5, 8, 3, 3], [1, 2, 22, 0, 3]]), {"0.weight": "embedding", "2.weight": "lm_head"}),
    row("mlp", lambda: nn.Sequential(
            Residual(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)), nn.Linear(12, 7)),
        x(2, 7, 12), {"0.1.weight": "mlp.up", "0.3.weight": "mlp.down", "1.weight": "lm_head"}),
    row("gated-mlp", lambda: nn.Sequential(Residual(nn.RMSNorm(12), GatedMlp()), nn.Linear(12, 7)), x(2, 7, 12),
        {"*.gate.weight": "mlp.gate", "*.up.weight": "mlp.up", "*.down.weight": "mlp.down", "1.weight": "lm_head"}),
    row("parameter-list", InAList, x(2, 7, 12), {"chain.[01]": "other", "chain.2": "lm_head"}),
)  # fmt: skip
