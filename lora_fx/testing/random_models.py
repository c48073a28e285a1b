"""Random models out of a table of blocks, one row for each way a model multiplies with a weight.

    RandomModel(Linear(inputs=3, outputs=2), Again(0), head="linear", dtype=torch.float32, seed=7)

A model is what its `repr` says: that line, pasted, builds the same bits. Between two blocks stands glue without
parameters, which fits the features and keeps the numbers near 1, so every block follows every other. The strategies
that draw such models are in `lora_fx.testing`; nothing in here needs Hypothesis.
"""

from __future__ import annotations

# mypy: ignore-errors
# (These are ordinary models; what an nn.Module holds has no type.)
import copy
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = {"none": nn.Identity(), "tanh": torch.tanh, "gelu": F.gelu}

#: What every block can have around it; the first choice of each is the plain one.
GLUE: dict[str, tuple] = {
    "activation": tuple(ACTIVATIONS),
    "residual": (False, True),
    "dropout": (0.0, 0.25),
    "opaque": (False, True),
}

_IN, _OUT, _HEADS = (3, 2, 5, 7, 1), (2, 3, 7, 5, 1), (2, 3, 1)  # the first choices are not square
_BOTH = (True, False)


class Block(nn.Module):
    """One step of a model: (batch, tokens, inputs) → (batch, some tokens, outputs).

    A subclass is a row of the table. `build` makes the parameters, and sets `inputs` and `outputs` where they are no
    options. Its arguments are the block's options, the default of each all that can be chosen, simplest first; what was
    chosen is an attribute. `compute` multiplies.

    Args:
        activation: what follows the block.
        residual: add the block's input to its output.
        dropout: probability, after the activation.
        opaque: decide something by value, as eager code does: no trace can stand for that forward.
    """

    choices: ClassVar[dict[str, tuple]] = {}
    """The options, and what can be chosen."""
    ways: ClassVar[dict[str, tuple[str, Callable]]] = {}
    """For a block with one raw weight: option `how` → its axes, a letter each, and the product (block, x, weight)."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES
    """Where the CPU has a kernel."""
    keeps_length: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False
    inputs: int
    outputs: int

    def __init_subclass__(cls) -> None:
        options = inspect.signature(cls.build).parameters.values()
        cls.choices = cls.choices | {o.name: tuple(o.default) for o in options if o.default is not o.empty}

    def __init__(self, **options: Any) -> None:
        super().__init__()
        every = {**self.choices, **GLUE}
        if unknown := options.keys() - every.keys():
            raise TypeError(f"{type(self).__name__} has no option {sorted(unknown)}; it has {', '.join(every)}")
        self._options = {name: options.get(name, values[0]) for name, values in every.items()}
        vars(self).update(self._options)
        self.drop = nn.Dropout(self.dropout)
        self.build(**{name: self._options[name] for name in self.choices})

    def build(self, **options: Any) -> None: ...

    def raw(self, **sizes: int) -> nn.Parameter:
        """The weight that `how` wants, from the size of each letter."""
        return weight(*(sizes[axis] for axis in self.ways[self.how][0]))

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return self.ways[self.how][1](self, x, self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.opaque and x.shape[0] == 0:
            return x.new_zeros(0, 1, self.outputs)
        return self.compute(x)

    def __repr__(self) -> str:
        shown = {n: value for n, value in self._options.items() if n in self.choices or value != GLUE[n][0]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def weight(*shape: int) -> nn.Parameter:
    """A parameter whose values `draw_parameters` draws."""
    return nn.Parameter(torch.zeros(*shape))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Linear(Block):
    """x·Wᵀ + b, in a module of its own or as a function on a raw parameter."""

    def build(self, inputs=_IN, outputs=_OUT, bias=_BOTH, module=_BOTH):
        if module:
            self.linear = nn.Linear(inputs, outputs, bias)
        else:
            self.weight, self.bias = weight(outputs, inputs), weight(outputs) if bias else None

    def compute(self, x):
        return self.linear(x) if self.module else F.linear(x, self.weight, self.bias)


def _by_token(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(batch · tokens, n) → (batch, tokens, n), as x has them."""
    return y.unflatten(0, (x.shape[0], x.shape[1]))


class Matmul(Block):
    """`@` with a raw weight on either side, straight or transposed."""

    ways: ClassVar = {
        "right": ("io", lambda b, x, w: x @ w),
        "left": ("oi", lambda b, x, w: (w @ x.mT).mT),
        "transposed": ("oi", lambda b, x, w: x @ w.t()),
        "reversed": ("io", lambda b, x, w: torch.matmul(w.t(), x.transpose(1, 2)).transpose(1, 2)),
        "mm": ("io", lambda b, x, w: _by_token(torch.mm(x.flatten(0, 1), w), x)),
    }

    def build(self, inputs=_IN, outputs=_OUT, how=ways):
        self.weight = self.raw(i=inputs, o=outputs)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, tokens, heads · n) → (heads, batch · tokens, n)"""
    return x.unflatten(-1, (heads, -1)).movedim(2, 0).flatten(1, 2)


def _joined(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(heads, batch · tokens, n) → (batch, tokens, heads · n), with the batch and tokens of x."""
    return y.unflatten(1, (x.shape[0], x.shape[1])).movedim(0, 2).flatten(2)


def _apart(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, tokens, heads · n) → (batch, heads, tokens, n)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _together(y: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, n) → (batch, tokens, heads · n)"""
    return y.transpose(1, 2).flatten(2)


class Bmm(Block):
    """A batch of weights, one for each head; or one weight, expanded over the batch."""

    ways: ClassVar = {
        "bmm": ("hio", lambda b, x, w: _joined(torch.bmm(_by_head(x, b.heads), w), x)),
        "bmm_left": ("hoi", lambda b, x, w: _joined(torch.bmm(w, _by_head(x, b.heads).mT).mT, x)),
        "matmul": ("hio", lambda b, x, w: _together(_apart(x, b.heads) @ w)),
        "matmul_left": ("hoi", lambda b, x, w: _together((w @ _apart(x, b.heads).mT).mT)),
        "expanded": ("io", lambda b, x, w: _joined(torch.bmm(_by_head(x, b.heads), w.expand(b.heads, -1, -1)), x)),
    }

    def build(self, heads=_HEADS, head_inputs=_IN, head_outputs=_OUT, how=ways):
        self.inputs, self.outputs = heads * head_inputs, heads * head_outputs
        self.weight = self.raw(h=heads, i=head_inputs, o=head_outputs)


class Addmm(Block):
    """beta·bias + alpha·(x @ W), with two axes or three, the weight on either side."""

    ways: ClassVar = {
        "addmm": ("IO", lambda b, x, w: _by_token(b.sum(b.bias, x.flatten(0, 1), w), x)),
        "addmm_left": ("OI", lambda b, x, w: _by_token(b.sum(b.bias[:, None], w, x.flatten(0, 1).t()).t(), x)),
        "baddbmm": ("hio", lambda b, x, w: _joined(b.sum(b.bias, _by_head(x, b.heads), w), x)),
        "baddbmm_left": ("hoi", lambda b, x, w: _joined(b.sum(b.bias.mT, w, _by_head(x, b.heads).mT).mT, x)),
    }

    def build(
        self, heads=_HEADS, head_inputs=_IN, head_outputs=_OUT, how=ways, beta_alpha=((1, 1), (0.5, 2), (1, 0.7))
    ):
        self.beta, self.alpha = beta_alpha
        self.inputs, self.outputs = heads * head_inputs, heads * head_outputs
        self.weight = self.raw(h=heads, i=head_inputs, o=head_outputs, I=self.inputs, O=self.outputs)
        self.bias = weight(self.outputs) if how.startswith("addmm") else weight(heads, 1, head_outputs)

    def sum(self, *operands):
        op = torch.addmm if self.how.startswith("addmm") else torch.baddbmm
        return op(*operands, beta=self.beta, alpha=self.alpha)


class Einsum(Block):
    """A matmul as an equation: b batch, t tokens, h heads, i in, o out; the term without b is the weight's."""

    equations = (
        "bti,io->bto", "oi,bti->bto", "...i,oi->...o", "bti,io", "bti,iho->btho", "bti,hio->bhto", "bthi,hio->bto",
        "bthi,ohi->bto", "bthi,hio->btho",
    )  # fmt: skip

    def build(self, equation=equations, heads=_HEADS, head_inputs=_IN, head_outputs=_OUT):
        sizes = {"h": heads, "i": head_inputs, "o": head_outputs}
        left, _, out = equation.replace("...", "bt").partition("->")
        first, second = left.split(",")
        w, x = (first, second) if "b" in second else (second, first)
        self.weight_first, self.split = w == first, "h" in x
        out = out or "".join(sorted(set(w) ^ set(x)))
        self.order = tuple(out.index(label) for label in "btho" if label in out)
        self.inputs = head_inputs * (heads if self.split else 1)
        self.outputs = head_outputs * (heads if "h" in out else 1)
        self.weight = weight(*(sizes[label] for label in w))

    def compute(self, x):
        if self.split:
            x = x.unflatten(-1, (self.heads, -1))
        operands = (self.weight, x) if self.weight_first else (x, self.weight)
        return torch.einsum(self.equation, *operands).permute(self.order).flatten(2)


#: Sizes of the spatial axes beside the tokens, and of the kernel along them.
_BESIDE, _KERNEL_BESIDE = (3, 2), (3, 1)


class _Convolution(Block):
    """Along the tokens, and along axes made of the features; so that every kernel fits, `more` tokens are added."""

    choices: ClassVar = {"spatial": (1, 2, 3), "groups": (1, 2), "group_inputs": (3, 1, 2), "group_outputs": (2, 3, 1)}
    keeps_length = False
    more = 1

    def convolution(self, kind: str, kernel, stride, padding, dilation, **others) -> nn.Module:
        self.beside = _BESIDE[: self.spatial - 1]
        lost = [extent - 1 if padding == "valid" else 0 for extent in _KERNEL_BESIDE]
        left = [size - less for size, less in zip(self.beside, lost, strict=False)]
        channels, out = self.groups * self.group_inputs, self.groups * self.group_outputs
        self.inputs, self.outputs = channels * math.prod(self.beside), out * math.prod(left)
        if not isinstance(padding, str):
            padding = self.along(padding, (1, 0))
        others |= dict(stride=self.along(stride, (1, 1)), padding=padding, dilation=self.along(dilation, (1, 1)))
        others |= dict(groups=self.groups, bias=self.bias)
        return getattr(nn, f"{kind}{self.spatial}d")(channels, out, self.along(kernel, _KERNEL_BESIDE), **others)

    def along(self, first: int, beside: tuple[int, int]) -> tuple[int, ...]:
        return (first, *beside)[: self.spatial]

    def compute(self, x):
        x = F.pad(x, (0, 0, 0, self.more)).unflatten(-1, (-1, *self.beside)).transpose(1, 2)
        return self.conv(x).transpose(1, 2).flatten(2)


class Conv(_Convolution):
    """The ordinary ones."""

    geometries = (  # kernel, stride, padding, dilation
        (3, 1, 0, 1), (1, 1, 0, 1), (2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 2, 2), (3, 1, "same", 2), (4, 1, "same", 2),
        (2, 1, "valid", 3),
    )  # fmt: skip
    modes = ("zeros", "circular", "reflect", "replicate")

    def build(self, geometry=geometries, mode=modes, bias=_BOTH, **channels):
        kernel, *_, dilation = geometry
        self.more, self.conv = dilation * (kernel - 1), self.convolution("Conv", *geometry, padding_mode=mode)


class ConvTranspose(_Convolution):
    """Transposed ones; torch's module decides too much to be traced, so there is the function as well."""

    geometries = (  # kernel, stride, padding, output padding, dilation
        (3, 1, 0, 0, 1), (1, 1, 0, 0, 1), (2, 2, 0, 0, 1), (3, 2, 1, 1, 1), (2, 1, 1, 1, 2),
    )  # fmt: skip

    def build(self, geometry=geometries, bias=_BOTH, module=_BOTH, **channels):
        kernel, stride, padding, output_padding, dilation = geometry
        output_padding = self.along(output_padding, (0, 0))
        conv = self.convolution("ConvTranspose", kernel, stride, padding, dilation, output_padding=output_padding)
        self.conv = conv if module else _FunctionalTranspose(conv)


class _FunctionalTranspose(nn.Module):
    """The function of a transposed convolution, on its parameters."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.spatial = conv.weight, conv.bias, conv.weight.ndim - 2
        self.geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)

    def forward(self, x):
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        return function(x, self.weight, self.bias, *self.geometry)


class Embedding(Block):
    """A lookup: as a module, as a function on a raw parameter, with a padding index, a bag of all the tokens."""

    reads_ids = True

    def build(self, rows=(5, 2, 7), outputs=(3, 2, 4, 1), how=("module", "function", "padding", "bag")):
        self.inputs = 1
        if how == "function":
            self.weight = weight(rows, outputs)
        elif how == "bag":
            self.table = nn.EmbeddingBag(rows, outputs, mode="mean")
        else:
            self.table = nn.Embedding(rows, outputs, padding_idx=0 if how == "padding" else None)

    @property
    def parameter(self) -> nn.Parameter:
        return self.weight if self.how == "function" else self.table.weight

    def compute(self, x):
        if self.how == "function":
            return F.embedding(x, self.weight)
        if self.how == "bag":
            return self.table(x).unsqueeze(1)
        return self.table(x)


class Experts(Block):
    """(experts, …) weights: a loop over the experts, a gather of some, a slice of them."""

    ways: ClassVar = {
        "loop": ("eoi", lambda b, x, w: b.summed(x, [w[e] for e in range(b.experts)])),
        "picked": (
            "eoi",
            lambda b, x, w: _by_token(torch.bmm(_by_head(x, b.experts), w[b.order].transpose(1, 2)).sum(0), x),
        ),
        "picked_one": ("eoi", lambda b, x, w: b.summed(x, [w[b.order[e]] for e in range(b.experts)])),
        "unbound": ("eoi", lambda b, x, w: b.summed(x, w.unbind(0))),
    }

    def build(self, experts=(2, 3), expert_inputs=_IN, expert_outputs=_OUT, how=ways):
        self.inputs, self.outputs = experts * expert_inputs, expert_outputs
        self.weight = self.raw(e=experts, i=expert_inputs, o=expert_outputs)
        self.register_buffer("order", torch.arange(experts).flip(0))

    def summed(self, x, weights):
        parts = x.unflatten(-1, (self.experts, -1)).unbind(2)
        return sum(F.linear(part, w) for part, w in zip(parts, weights, strict=True))


class GroupedExperts(Block):
    """`grouped_mm`: rows in groups, a weight for each; the kernel wants rows of 16 bytes."""

    dtypes = (torch.float32, torch.bfloat16)

    def build(self, experts=(2, 3), expert_inputs=(16, 8), expert_outputs=(8, 16), layout=("in-out", "out-in")):
        self.inputs, self.outputs = experts * expert_inputs, expert_outputs
        sizes = (expert_inputs, expert_outputs)
        self.weight = weight(experts, *(sizes if layout == "in-out" else sizes[::-1]))

    def compute(self, x):
        rows = _by_head(x, self.experts)
        ends = torch.arange(1, self.experts + 1, dtype=torch.int32, device=x.device) * rows.shape[1]
        w = self.weight if self.layout == "in-out" else self.weight.transpose(1, 2)
        y = F.grouped_mm(rows.flatten(0, 1), w, offs=ends.to(torch.int32))
        return _by_token(y.unflatten(0, (self.experts, -1)).sum(0), x)


class Sliced(Block):
    """One weight read through several views."""

    ways: ClassVar = {
        "columns": ("in", lambda b, x, w: torch.tanh(x @ w[:, : b.half]) * (1 + x @ w[:, b.half :])),
        "rows": ("ni", lambda b, x, w: F.linear(x, w[b.half :]) - torch.tanh(F.linear(x, w[: b.half]))),
        "chunk": ("ni", lambda b, x, w: b.gated(x, *w.chunk(2))),
        "part": ("ni", lambda b, x, w: F.linear(x, w[b.half :])),
        "every_other": ("ni", lambda b, x, w: F.linear(x, w[::2]) - torch.tanh(F.linear(x, w[1::2]))),
        "inputs": (
            "ni",
            lambda b, x, w: F.linear(x[..., :1], w[: b.half, :1]).tanh() + F.linear(x[..., 1:], w[b.half :, 1:]).tanh(),
        ),
        "viewed": ("ni", lambda b, x, w: torch.einsum("bti,poi->btpo", x, w.view(2, b.half, b.inputs)).prod(2)),
    }

    def build(self, inputs=(3, 2, 5, 7), half=(2, 1, 3), how=ways):
        self.outputs = half
        self.weight = self.raw(i=inputs, n=2 * half)

    def gated(self, x, w, gate):
        return F.linear(x, w) * torch.sigmoid(F.linear(x, gate))


class _Multiply(nn.Module):
    """Multiplies with a weight that it is handed."""

    def forward(self, x, weight):
        return F.linear(x, weight)


class Borrowed(Block):
    """A parent that multiplies with its child's weight: in its place, beside it, back through it, or handing it on."""

    borrows: ClassVar = {
        "alone": lambda b, x, child: F.linear(x, child.weight, child.bias),
        "beside": lambda b, x, child: child(x) - F.linear(x.flip(-1), child.weight).tanh(),
        "back": lambda b, x, child: F.linear(child(x).tanh(), child.weight.t()),  # as a tied autoencoder goes
        "handed": lambda b, x, child: b.multiply(x, child.weight),
    }

    def build(self, inputs=_IN, outputs=_OUT, how=borrows):
        self.outputs = inputs if how == "back" else outputs
        self.child, self.multiply = nn.Linear(inputs, outputs), _Multiply()

    def compute(self, x):
        return self.borrows[self.how](self, x, self.child)


class Chain(Block):
    """Raw matmuls in a row, one reading what the other made: the trap of stale inputs."""

    def build(self, sizes=((3, 2, 5), (2, 3, 4, 7), (5, 1, 3)), listed=(False, True)):
        self.inputs, self.outputs = sizes[0], sizes[-1]
        weights = [weight(a, b) for a, b in itertools.pairwise(sizes)]
        self.first, self.second, *more = weights if not listed else (None, None)
        self.more = nn.ParameterList(weights if listed else more)

    def compute(self, x):
        if not self.listed:
            x = x @ self.first @ self.second
        for w in self.more:
            x = x @ w
        return x


class Repeated(Block):
    """One module called three times in one forward, its output its next input."""

    def build(self, size=(3, 2, 5, 1)):
        self.inputs = self.outputs = size
        self.again = nn.Linear(size, size)

    def compute(self, x):
        return self.again(self.again(self.again(x).tanh()))


class Gated(Block):
    """A gated MLP, its gate and up projections apart or fused."""

    def build(self, inputs=(3, 2, 5), hidden=(4, 2, 7, 1), fused=(False, True), bias=_BOTH):
        self.outputs = inputs
        if fused:
            self.gate_up = nn.Linear(inputs, 2 * hidden, bias)
        else:
            self.gate, self.up = nn.Linear(inputs, hidden, bias), nn.Linear(inputs, hidden, bias)
        self.down = nn.Linear(hidden, inputs, bias)

    def compute(self, x):
        if self.fused:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(F.silu(gate) * up)


def _mirrored(x: torch.Tensor) -> torch.Tensor:
    """The tokens and their mirror images: two different keys even for one token."""
    return torch.cat([x, x.flip(-1)], dim=1)


def _unmirrored(y: torch.Tensor) -> torch.Tensor:
    one, other = y.chunk(2, dim=1)
    return one - other.tanh()


class Attention(Block):
    """Attention: q, k, v apart, fused one after the other, fused head by head, or only k and v fused."""

    cores = ("sdpa", "softmax")
    projections: ClassVar = {  # what is fused → each projection with how many of q, k and v it makes, and all three
        "apart": ({"query": 1, "key": 1, "value": 1}, lambda b, x: b.split(b.query(x), b.key(x), b.value(x))),
        "blocks": ({"qkv": 3}, lambda b, x: b.split(*b.qkv(x).chunk(3, dim=-1))),
        "interleaved": ({"qkv": 3}, lambda b, x: _apart(b.qkv(x), b.heads).chunk(3, dim=-1)),
        "key_value": ({"query": 1, "key_value": 2}, lambda b, x: b.split(b.query(x), *b.key_value(x).chunk(2, dim=-1))),
    }

    def build(self, inputs=(3, 2, 5), heads=(2, 1, 3), head_size=(2, 3), fused=projections, core=cores, bias=_BOTH):
        self.outputs = inputs
        for name, parts in self.projections[fused][0].items():
            self.add_module(name, nn.Linear(inputs, parts * heads * head_size, bias))
        self.output = nn.Linear(heads * head_size, inputs, bias)

    def split(self, *fused):
        return [_apart(t, self.heads) for t in fused]

    def compute(self, x):
        q, k, v = self.projections[self.fused][1](self, _mirrored(x))
        if self.core == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT * self.head_size**-0.5).softmax(-1) @ v
        return _unmirrored(self.output(_together(y)))


class TorchAttention(Block):
    """`nn.MultiheadAttention`, whose projections are read by a function, not by their modules."""

    def build(self, heads=(2, 1), head_size=(2, 3), kdim=(False, True), bias=_BOTH, weights=(False, True)):
        self.inputs = self.outputs = heads * head_size
        keys = self.inputs + 1 if kdim else None
        self.attention = nn.MultiheadAttention(self.inputs, heads, bias=bias, kdim=keys, vdim=keys, batch_first=True)

    def compute(self, x):
        x = _mirrored(x)
        keys = F.pad(x, (0, 1), value=0.5) if self.kdim else x
        return _unmirrored(self.attention(x, keys, keys, need_weights=self.weights)[0])


class TorchEncoder(Block):
    """`nn.TransformerEncoderLayer`, whose fused path in eval mode reads its children's weights."""

    def build(self, heads=(2, 1), head_size=(3, 4), hidden=(5, 3), norm_first=(False, True)):
        self.inputs = self.outputs = heads * head_size
        self.layer = nn.TransformerEncoderLayer(
            self.inputs, heads, hidden, dropout=0.0, norm_first=norm_first, batch_first=True
        )

    def compute(self, x):
        return _unmirrored(self.layer(_mirrored(x)))


class Recurrent(Block):
    """Kernels that take their weights whole."""

    kinds = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell")

    def build(
        self, kind=kinds, inputs=_IN, hidden=(2, 3, 5, 1), layers=(1, 2), bidirectional=(False, True), bias=_BOTH
    ):
        if kind.endswith("Cell"):
            self.outputs, self.cell = hidden, getattr(nn, kind)(inputs, hidden, bias)
            return
        self.outputs = hidden * (2 if bidirectional else 1)
        self.net = getattr(nn, kind)(inputs, hidden, layers, bias=bias, batch_first=True, bidirectional=bidirectional)

    def compute(self, x):
        x = _mirrored(x)  # two steps at least: in the first one the hidden state is zero
        if not self.kind.endswith("Cell"):
            return _unmirrored(self.net(x)[0])
        state, steps = None, []
        for token in x.unbind(1):
            state = self.cell(token, state)
            steps.append(state[0] if self.kind == "LSTMCell" else state)
        return _unmirrored(torch.stack(steps, dim=1))


def _time_first(x: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, n) → (tokens + 1, batch, n)"""
    return F.pad(x, (0, 0, 0, 1)).transpose(0, 1).contiguous()


class Whole(Block):
    """Ops beside which no branch can stand, and a matmul's weight that something else reads as well."""

    ways: ClassVar = {
        "bilinear": ("oii", lambda b, x, w: F.bilinear(x, x.flip(-1) + 1, w, b.bias)),
        "inner": ("oi", lambda b, x, w: torch.inner(x, w) + b.bias),
        "tensordot": ("io", lambda b, x, w: torch.tensordot(x, w, 1) + b.bias),
        "conv_tbc": ("kio", lambda b, x, w: torch.conv_tbc(_time_first(x), w, b.bias, 0).transpose(0, 1)),
        "addbmm": ("bio", lambda b, x, w: _by_token(torch.addbmm(b.bias, x.flatten(0, 1).unsqueeze(0), w), x)),
        "also_read": ("oi", lambda b, x, w: F.linear(x, w, b.bias) * (1 + w.square().mean())),
    }

    def build(self, inputs=_IN, outputs=_OUT, how=ways):
        self.weight, self.bias = self.raw(i=inputs, o=outputs, k=2, b=1), weight(outputs)


class Normed(Block):
    """A linear between norms with parameters; the batch norm also counts, in train mode."""

    norms: ClassVar = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm2d}

    def build(self, inputs=_IN, outputs=(3, 5, 4), norm=norms):
        self.batch = norm == "batch"
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = self.norms[norm](1 if self.batch else outputs)

    def compute(self, x):
        y = self.linear(x)
        return self.norm(y.unsqueeze(1)).squeeze(1) if self.batch else self.norm(y)


class Computed(Block):
    """A weight that is computed before it multiplies, which no rule can adapt, beside one that a rule can."""

    def build(self, inputs=_IN, outputs=_OUT):
        self.direction, self.gain = weight(outputs, inputs), weight(outputs, 1)
        self.plain = nn.Linear(inputs, outputs)

    def compute(self, x):
        return F.linear(x, self.direction * (1 + self.gain)) - self.plain(x).tanh()


#: The rows, those with the most common forms first.
BLOCKS: tuple[type[Block], ...] = (
    Linear, Matmul, Bmm, Addmm, Einsum, Conv, ConvTranspose, Embedding, Experts, GroupedExperts, Sliced, Borrowed,
    Chain, Repeated, Gated, Attention, TorchAttention, TorchEncoder, Recurrent, Whole, Normed, Computed,
)  # fmt: skip


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Again:
    """In the place of a block: the block at `index` once more, one module under two names."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index})"

    def of(self, block: nn.Module) -> nn.Module:
        return block


class Tied(Again):
    """In the place of a block: another module like the block at `index`, with its weights, and its own biases."""

    def of(self, block: nn.Module) -> nn.Module:
        twin = copy.deepcopy(block)
        for name, parameter in block.named_parameters(remove_duplicate=False):
            if parameter.ndim >= 2:
                path, _, attribute = name.rpartition(".")
                setattr(twin.get_submodule(path), attribute, parameter)
        return twin


HEADS = ("none", "linear", "parameter", "tied", "borrowed")
"""What ends a model: nothing; a module; a raw parameter of the model itself; a linear tied to the embedding; the
embedding's weight, which the model reads out of its child."""


class RandomModel(nn.Module):
    """Blocks in a row, with glue between them: an ordinary module that can be copied, pickled, trained and exported.

    Args:
        steps: blocks, and `Again` or `Tied` with the index of an earlier one.
        head: one of `HEADS`; the last two want an `Embedding` first.
        outputs: features of a head of its own.
        seed: every parameter and buffer is drawn from it.
        training: train mode.
    """

    def __init__(
        self,
        *steps: Block | Again,
        head: str = "none",
        outputs: int = 2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        training: bool = False,
    ) -> None:
        super().__init__()
        self._lines, self._seed, self.head = tuple(map(repr, steps)), seed, head
        self.blocks = nn.ModuleList()
        for step in steps:
            self.blocks.append(step if isinstance(step, Block) else step.of(self.blocks[step.index]))
        self._shown = dict(head=head, outputs=outputs, dtype=dtype, seed=seed, training=training)
        width = self.blocks[-1].outputs
        if head == "linear":
            self.last = nn.Linear(width, outputs)
        elif head == "parameter":
            self.weight = weight(width, outputs)
        elif head == "tied":
            table = self.blocks[0].parameter
            self.last = nn.Linear(table.shape[1], table.shape[0], bias=False)
            self.last.weight = table
        draw_parameters(self, seed)
        self.to(dtype)
        self.train(training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.blocks[0].inputs
        for block in self.blocks:
            y = block(x if block.reads_ids else fit(x, width, block.inputs))
            y = block.drop(ACTIVATIONS[block.activation](y))
            if block.residual and block.keeps_length and not block.reads_ids:
                y = y + fit(x, width, block.outputs)
            x, width = tame(y), block.outputs
        if self.head in ("linear", "tied"):
            return self.last(fit(x, width, self.last.in_features))
        if self.head == "parameter":
            return x @ self.weight
        if self.head == "borrowed":
            first = self.blocks[0]
            return F.linear(fit(x, width, first.outputs), first.parameter)
        return x

    def example(self, batch: int = 2, tokens: int = 3) -> tuple[torch.Tensor]:
        """Example inputs: indices where the first block looks up, else numbers of the model's own dtype."""
        first = self.blocks[0]
        if first.reads_ids:
            return (((torch.arange(batch * tokens) + 1) % first.rows).reshape(batch, tokens),)
        generator = torch.Generator().manual_seed(self._seed)
        x = torch.randn(batch, tokens, first.inputs, generator=generator, dtype=torch.float64)
        return (x.to(self._shown["dtype"]),)

    def __repr__(self) -> str:
        plain = dict(head="none", outputs=2, dtype=torch.float32, seed=0, training=False)
        shown = [f"{name}={value!r}" for name, value in self._shown.items() if value != plain[name]]
        lines = [f"    {line}," for line in self._lines]
        return "\n".join(["RandomModel(", *lines, *([f"    {', '.join(shown)},"] if shown else []), ")"])


def fit(x: torch.Tensor, have: int, want: int) -> torch.Tensor:
    """(…, have) → (…, want) features: repeated in turn, or added up in turn; every one of them still counts."""
    if have < want:
        return x.repeat(1, 1, -(-want // have))[..., :want]
    if have > want:
        return F.pad(x, (0, -have % want)).unflatten(-1, (-1, want)).sum(-2)
    return x


def tame(x: torch.Tensor) -> torch.Tensor:
    """The sample scaled to a size below 1; unlike a layer norm it forgets nothing, not even of one feature."""
    return x * torch.rsqrt(1 + x.square().mean((-2, -1), keepdim=True))


@torch.no_grad()
def draw_parameters(model: nn.Module, seed: int) -> None:
    """Matrices of std 1/sqrt(fan in), vectors moved off 0 and 1: no channel is dead, and no zero bias hides a bug."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    norms = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            centre = 1.0 if isinstance(module, norms) and name == "weight" else 0.0
            fan = parameter[0].numel() if parameter.ndim >= 2 else 10
            parameter.copy_(centre + normal(parameter.shape, fan**-0.5))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(normal(module.running_mean.shape, 0.1))
            module.running_var.copy_(1 + normal(module.running_var.shape, 0.1).abs())
