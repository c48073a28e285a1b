"""Roles: what each use of a weight does, read off the dataflow alone; no model, module or parameter name is looked at.

    query, key, value  reach an operand of softmax(q·kᵀ)·v or a fused attention; attention.output is fed by its result
    gate, up           reach  f(gate) * up  or  f(up), with f a nonlinearity; mlp.down is fed by that
    router             reaches a top-k; lm_head reaches the model's output with no use after it

One walk over the graph (`_Flow`) notes for every node which uses its value comes from, never looking past a use, and
whether it is in the residual stream: that is the sum of everything before it, so it says nothing of any one use.

A fused weight is split exactly, with no knowledge of its layout: the nodes between the use and a target run on random
float64 tensors, and the features with a nonzero gradient are the ones that reach the target (`_Splitter`).
What cannot be told for certain is `other`, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from lora_fx.forms import op_name
from lora_fx.layout import place
from lora_fx.program import Program, Use
from lora_fx.views import COPIES, MOVES

QUERY, KEY, VALUE, OUTPUT = "attention.query", "attention.key", "attention.value", "attention.output"
UP, GATE, DOWN = "mlp.up", "mlp.gate", "mlp.down"
ROUTER, EMBEDDING, LM_HEAD, CONV, OTHER = "router", "embedding", "lm_head", "conv", "other"
ROLES: tuple[str, ...] = (QUERY, KEY, VALUE, OUTPUT, UP, GATE, DOWN, ROUTER, EMBEDDING, LM_HEAD, CONV, OTHER)


@dataclass(frozen=True)
class Label:
    """The role of a use, or of a part of its weight's output features."""

    role: str
    rows: tuple[int, ...] | None
    """None: all output features of the weight; else the indices along its layout's out side, ascending."""
    reason: str = ""
    """For `other`: why no role was given."""


def label_uses(program: Program) -> dict[Use, tuple[Label, ...]]:
    """The role of every use that multiplies. The rows of a fused weight's labels partition its output features."""
    if program.capture is None:
        return {}
    return _Labeller(program).labels()


# ── ops ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_PRODUCTS = frozenset({"matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "einsum", "tensordot"})
_LIKE = frozenset({"type_as", "expand_as", "view_as", "reshape_as"})  # the second argument gives no values
_FUSED_ATTENTION = frozenset({"flex_attention", "_flash_attention_forward", "_efficient_attention_forward"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_BENDS = frozenset({  # the nonlinearities of MLPs; a clamp with two bounds is none
    "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "tanh", "sigmoid", "softplus", "log_sigmoid", "prelu", "threshold", "erf", "softsign", "glu", "expm1",
})  # fmt: skip
_ADDS = frozenset({"add", "sub", "rsub", "index_add", "scatter_add", "addcmul", "lerp"})
_CHOICES = frozenset({"topk", "argmax", "sort", "argsort", "kthvalue"})
_CUTS = frozenset({  # what separates features
    "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem", "index",
    "index_select", "gather", "unsafe_chunk", "unsafe_split",
})  # fmt: skip
_RELAYS = frozenset({  # what moves axes or elements to other places
    "transpose", "permute", "t", "mT", "movedim", "swapaxes", "gather", "index", "index_select", "flip", "roll",
    "as_strided", "index_put", "take_along_dim", "scatter", "copy",
})  # fmt: skip
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"})
_ALIASES = frozenset({*MOVES, *COPIES, "expand_as", "view_as", "as_strided", "diagonal"} - {"clone", "lift_fresh_copy"})
_CONVS = frozenset({"conv", "conv_transpose", "conv_tbc", "convolution"})
_LOOKUPS = frozenset({"embedding", "embedding_bag"})
_PLAIN_PRODUCTS = _PRODUCTS | {"linear", "mv", "inner", "addmv", "chain_matmul", "linalg_multi_dot", "grouped_mm",
                               "_grouped_mm", "grouped_mm_fallback"}  # fmt: skip


def _base_name(node: fx.Node) -> str:
    """The name of its op; an in-place op is called as the one that makes a new tensor."""
    name = op_name(node.target)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _is_fused_attention(name: str) -> bool:
    return "scaled_dot_product" in name or name in _FUSED_ATTENTION


def _is_float(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    return isinstance(value, list | tuple) and any(_is_float(v) for v in value)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _dim(node: fx.Node) -> int:
    """The dim that a softmax or a glu runs along, counted from the last."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return dim - len(_shape(node)) if dim >= 0 else dim


def _operands(node: fx.Node, name: str) -> list[fx.Node]:
    """The factors of a product."""
    args: Any = node.args
    if name == "einsum":
        args = args[1] if isinstance(args[1], list | tuple) else args[1:]
    elif name in ("baddbmm", "addmm", "addbmm"):
        args = [*args[1:3], *(v for k, v in node.kwargs.items() if k[:-1] in ("batch", "mat"))]
    return [a for a in args if isinstance(a, fx.Node)]


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments an op writes in place."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    writable = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [arg for name in writable if isinstance(arg := given.get(name), fx.Node)]


# ── the flow ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_INPUT, _CORE, _MIX = 1, 2, 4  # what a value may come from beside uses: model input, attention, another product
_FIRST_USE = 8


@dataclass(frozen=True)
class _Target:
    """The value of `node` as `reader` reads it, after whatever was written into it; or a part (dim, start, length)."""

    reader: fx.Node
    node: fx.Node
    part: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class _Act:
    """A nonlinearity behind a value: f(gate), and the factor beside it where there is one."""

    gate: _Target
    up: _Target | None
    origins: int
    """The uses it comes from."""
    clear: bool = True


@dataclass(slots=True)
class _Fact:
    """What a node's value comes from, looking no further than the nearest uses."""

    live: bool = False
    """It depends on the model's inputs."""
    frontier: int = 0
    """The nearest uses, a bit each."""
    above: int = 0
    """Every use before those."""
    stream: bool = False
    """It is a residual sum, or made of one."""
    bent: bool = False
    """A nonlinearity lies between the uses and it."""
    weighs: bool = False
    """It comes out of a softmax or a top-k: a weighting, no feature."""
    softmax: fx.Node | None = None
    """It is this softmax, perhaps masked, scaled or sliced."""
    origin: fx.Node | None = None
    """The node that it is an elementwise function of."""
    acts: tuple[_Act, ...] = ()


@dataclass(frozen=True)
class _Core:
    """One attention: its operands."""

    node: fx.Node
    query: tuple[_Target, ...]
    key: tuple[_Target, ...]
    value: tuple[_Target, ...]


class _Flow:
    """One walk over the graph, in its order; linear, since nothing looks past a use."""

    def __init__(self, program: Program) -> None:
        assert program.capture is not None
        self.nodes = list(program.graph.nodes)
        self.order = {node: k for k, node in enumerate(self.nodes)}
        self.capture = program.capture
        self.splitter = _Splitter(self)
        self.uses: dict[fx.Node, list[Use]] = {}
        for use in program.uses:
            if use.multiplies:
                self.uses.setdefault(use.node, []).append(use)
        in_order = sorted(self.uses, key=self.order.__getitem__)
        self.bit = {node: _FIRST_USE << k for k, node in enumerate(in_order)}
        self.at = {bit: node for node, bit in self.bit.items()}
        self._facts: dict[fx.Node, _Fact] = {}
        self.inputs: dict[fx.Node, _Fact] = {}  # what each use multiplies its weight with
        self.cores: list[_Core] = []
        self.root: dict[fx.Node, fx.Node] = {}  # the tensor that a view looks into
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        self.over: dict[fx.Node, _Fact] = {}  # what was written into a tensor so far
        # Bits of the uses that …
        self.added = 0  # … are added to the residual stream
        self.used = 0  # … feed another use
        self.bending = 0  # … feed a nonlinearity
        self.chosen = 0  # … feed a top-k
        self.out = 0  # … reach the model's output
        self.cut = 0  # … are sliced
        self.operands = 0  # … feed an attention
        self.mixed = 0  # … feed a product of activations that is no attention
        self.positions = 0  # … multiply a table of relative positions
        self.visits = 0
        for node in self.nodes:
            self._visit(node)

    def uses_in(self, bits: int) -> Iterator[fx.Node]:
        bits &= -_FIRST_USE
        while bits:
            lowest = bits & -bits
            yield self.at[lowest]
            bits ^= lowest

    def _visit(self, node: fx.Node) -> None:
        self.visits += 1
        if node.op == "output":
            for source in node.all_input_nodes:
                self.out |= self.fact(source).frontier
            return
        if node.op != "call_function":
            given = node.op == "placeholder" and node not in self.capture.tensors
            floats = given and _is_float(node.meta.get("val"))
            self._facts[node] = _Fact(live=given, frontier=_INPUT if floats else 0, origin=node)
            return
        name = _base_name(node)
        self._facts[node] = self._fact(node, name)
        self._note_aliases(node, name)

    def _fact(self, node: fx.Node, name: str) -> _Fact:
        reads = [self.fact(n) for n in node.all_input_nodes]
        live = any(f.live for f in reads)
        above = 0
        for f in reads:
            above |= f.frontier | f.above
        if node in self.uses:
            return self._use(node, name, live, above)
        if _is_fused_attention(name):
            q, k, v = ((_Target(node, operand),) for operand in _operands(node, name)[:3])
            return self._core(_Core(node, q, k, v), live, above)
        if name in _CHOICES or (name == "max" and self._picks(node)):
            self.chosen |= self._chosen(node.all_input_nodes)
        if not _is_float(node.meta.get("val")):
            return _Fact(live=live, origin=node)
        found = None
        if name in _PRODUCTS:
            found = self._attention(node, name, live, above) or self._mix(node, name, live)
        return found or self._plain(node, name, live)

    def _chosen(self, nodes: Iterable[fx.Node]) -> int:
        """The uses that a top-k chooses by, unless it is the stream or a product of activations that it sorts."""
        bits = 0
        for fact in (self.fact(n) for n in nodes):
            bits |= 0 if fact.stream or fact.frontier & (_MIX | _CORE) else fact.frontier
        return bits

    @staticmethod
    def _picks(node: fx.Node) -> bool:
        """Its indices are used, not only the largest values."""
        return any(_base_name(user) == "getitem" and user.args[1] == 1 and user.users for user in node.users)

    # A use: what is behind it stays behind.

    def _use(self, node: fx.Node, name: str, live: bool, above: int) -> _Fact:
        read = {u.call.x for u in self.uses[node] if u.call is not None} or set(node.all_input_nodes)
        fact = _join([self.fact(n) for n in read if isinstance(n, fx.Node)])
        if name in _PRODUCTS and (core := self._attention(node, name, live, above)) is not None:
            fact = core  # a weight inside the second product: p, v and W in one einsum
        self.inputs[node] = fact
        self.used |= fact.frontier
        after = _Fact(live=live, frontier=self.bit[node], above=above, origin=node)
        if self._is_depthwise(node) and not fact.stream:  # features stay apart: it is seen through
            after.frontier |= fact.frontier
            after.bent, after.acts = fact.bent, fact.acts
        if any(self.fact(n).frontier for n in node.all_input_nodes if n not in read):  # addmm(residual, x, W)
            after.stream = True
            self.added |= after.frontier
        return after

    def _is_depthwise(self, node: fx.Node) -> bool:
        use = self.uses[node][0]
        return use.form == "conv" and use.weight.shape[1] == 1 and use.weight.shape[0] > 1

    # Attention.

    def _core(self, core: _Core, live: bool, above: int) -> _Fact:
        self.cores.append(core)
        for target in (*core.query, *core.key, *core.value):
            fact = self.fact(target.node)
            self.operands |= 0 if fact.stream else fact.frontier
        return _Fact(live=live, frontier=_CORE, above=above, origin=core.node)

    def _factors(self, node: fx.Node, name: str) -> list[fx.Node]:
        return [n for n in _operands(node, name) if self.fact(n).frontier]

    def _attention(self, node: fx.Node, name: str, live: bool, above: int) -> _Fact | None:
        """softmax(…)·v, where the softmax is one of products of activations."""
        factors = self._factors(node, name)
        weights = [n for n in factors if self.fact(n).softmax is not None]
        if len(factors) < 2 or len(weights) != 1:
            return None
        scores = _Scores(self, self.fact(weights[0]).softmax)  # type: ignore[arg-type]
        if not scores.found:
            return None
        values = tuple(_Target(node, n) for n in factors if n is not weights[0])
        return self._core(_Core(node, scores.query, scores.key, values), live, above)

    def _mix(self, node: fx.Node, name: str, live: bool) -> _Fact | None:
        """Another product of activations: what comes out of it is made of tokens, not of features."""
        factors = self._factors(node, name)
        if len(factors) < 2:
            return None
        for n in factors:
            self.mixed |= self.fact(n).frontier
        fact = self._plain(node, name, live)
        fact.frontier |= _MIX
        fact.bent, fact.acts, fact.origin, fact.softmax = False, (), node, None
        return fact

    # Everything else.

    def _plain(self, node: fx.Node, name: str, live: bool) -> _Fact:
        sources = [n for n in node.all_input_nodes[: 1 if name in _LIKE else None] if self.fact(n).frontier]
        fact = _join([self.fact(n) for n in sources])
        fact.live = live
        cuts = name in _CUTS
        fact.origin = node if cuts or fact.origin is None else fact.origin
        if not fact.stream and cuts:
            self.cut |= fact.frontier
        if name in _SOFTMAX:
            fact.softmax, fact.weighs, fact.bent, fact.acts = node, True, False, ()
        elif name in _CHOICES:
            fact.weighs, fact.softmax = True, None
        if name in _PLAIN_PRODUCTS and len(node.all_input_nodes) > len(sources):
            self.used |= fact.frontier  # by a computed weight, which is no use that could be adapted
        if name in _ADDS and len(sources) > 1:
            self._add(fact, sources)
        elif name in ("mul", "div") and len(sources) == 2 and not fact.stream:
            self._multiply(fact, node, *sources)
        if self._bends(node, name) and sources:
            self._bend(fact, node, name, sources[0])
        if fact.stream:
            fact.acts, fact.bent = (), False
        return fact

    def _add(self, fact: _Fact, sources: list[fx.Node]) -> None:
        """A sum with something that lies before the uses of the other summand is the residual stream."""
        for a in sources:
            for b in sources:
                older, branch = self.fact(a), self.fact(b)
                at = older.frontier & ~(_CORE | _MIX | (self.operands if branch.frontier & _CORE else 0))
                # Where both come from one use, it is a recurrence within a block: a state space, a scan.
                if at & branch.above and not at & branch.frontier & -_FIRST_USE:
                    fact.stream = True
                    self.added |= 0 if branch.stream else branch.frontier

    @staticmethod
    def _bends(node: fx.Node, name: str) -> bool:
        if name in ("clamp", "clamp_min"):  # with zero below and nothing above it is a relu
            low, high = [*node.args[1:], None, None][:2]
            return bool(node.kwargs.get("min", low) == 0) and node.kwargs.get("max", high) is None
        return name in _BENDS

    def _bend(self, fact: _Fact, node: fx.Node, name: str, source: fx.Node) -> None:
        if fact.stream or fact.frontier < _FIRST_USE:
            return
        self.bending |= fact.frontier
        fact.bent = True
        if name == "glu":
            dim, half = _dim(node), _shape(node)[_dim(node)]
            up, gate = (_Target(node, source, (dim, start, half)) for start in (0, half))
            fact.acts, fact.origin = (_Act(gate, up, fact.frontier),), node
        elif not fact.acts:
            fact.acts = (_Act(_Target(node, source), None, fact.frontier),)

    def _multiply(self, fact: _Fact, node: fx.Node, a: fx.Node, b: fx.Node) -> None:
        """f(gate) * up, unless one is an elementwise function of the other (x * sigmoid(x)) or only weighs."""
        left, right = self.fact(a), self.fact(b)
        scales = [self._scales(a, b), self._scales(b, a)]
        if scales[0] != scales[1]:
            kept, scale = (right, left) if scales[0] else (left, right)
            self.used |= scale.frontier & ~kept.frontier
            fact.frontier, fact.acts, fact.bent = kept.frontier, kept.acts, kept.bent
            fact.origin, fact.weighs, fact.softmax = kept.origin, kept.weighs, kept.softmax
            return
        features = left.frontier >= _FIRST_USE and right.frontier >= _FIRST_USE
        if left.origin is right.origin or not features or not (left.bent or right.bent):
            return
        gate, up = (a, b) if left.bent else (b, a)
        acts = self.fact(gate).acts
        clear = left.bent != right.bent and all(act.up is None for act in acts)
        fact.acts = (_Act(_Target(node, gate), _Target(node, up), fact.frontier, clear),)

    def _scales(self, node: fx.Node, other: fx.Node) -> bool:
        """It weighs the other's features, all alike: a routing weight, a gate with one value a token."""
        mine, theirs = _shape(node), _shape(other)
        one = mine[-1:] == (1,) and theirs[-1:] != (1,) and len(theirs) > 0
        return one or (self.fact(node).weighs and self.fact(node).softmax is None and not self.fact(other).weighs)

    # Tensors written in place.

    def _note_aliases(self, node: fx.Node, name: str) -> None:
        written = _written(node)
        source = written[0] if written else node.args[0] if node.args else None
        looks = bool(written) or name in _ALIASES or name == "getitem"
        root = self.root.get(source, source) if looks and isinstance(source, fx.Node) else node
        self.root[node] = root
        if written:
            self._write(node, written)

    def _write(self, node: fx.Node, written: list[fx.Node]) -> None:
        """Whoever reads the tensor from now on, through whatever view, reads what was written."""
        new = self._facts[node]
        for root in {self.root.get(w, w) for w in written}:
            self.writes.setdefault(root, []).append(node)
            before = self.over.get(root)
            self.over[root] = _join([before, new]) if before else new

    def fact(self, node: fx.Node) -> _Fact:
        """What is known of the node's value by now."""
        fact = self._facts[node]
        over = self.over.get(self.root.get(node, node))
        if over is None or over is fact or not _is_float(node.meta.get("val")):
            return fact
        joined = _join([fact, over])
        joined.origin, joined.softmax = node, over.softmax
        return joined

    def writes_between(self, target: fx.Node, reader: fx.Node) -> list[fx.Node]:
        writes = self.writes.get(self.root.get(target, target), ())
        first, last = self.order[target], self.order[reader]
        return [w for w in writes if first < self.order[w] < last]


def _join(facts: list[_Fact]) -> _Fact:
    """What is known of a value computed from all of these."""
    joined = _Fact()
    softmaxes, origins = set(), set()
    acts: list[_Act] = []
    for f in facts:
        joined.live |= f.live
        joined.frontier |= f.frontier
        joined.above |= f.above
        joined.stream |= f.stream
        joined.bent |= f.bent
        joined.weighs |= f.weighs
        if f.frontier:
            softmaxes.add(f.softmax)
            origins.add(f.origin)
            acts += f.acts
    joined.softmax = softmaxes.pop() if len(softmaxes) == 1 else None
    joined.origin = origins.pop() if len(origins) == 1 else None
    joined.acts = tuple(dict.fromkeys(acts))
    return joined


# ── attention spelled out: which operand of the first product is the query ───────────────────────────────────────────


class _Scores:
    """The products q·kᵀ whose sum is the input of a softmax; the key is the operand that owns the softmaxed axis."""

    def __init__(self, flow: _Flow, softmax: fx.Node) -> None:
        self.flow, self.softmax = flow, softmax
        self.toward: dict[fx.Node, fx.Node] = {}  # node → the one after it on the way to the softmax
        pairs = [(p, ops) for p in self._products() if len(ops := flow._factors(p, _base_name(p))) == 2]
        live = [(p, ops) for p, ops in pairs if all(flow.fact(n).live for n in ops)]
        self._note_positions(pairs if live else [])
        query, key = [], []
        for product, operands in live or pairs:
            side = self._key_side(product, operands)
            if side is not None:
                key.append(_Target(product, operands[side]))
                query.append(_Target(product, operands[1 - side]))
        self.found = bool(query)
        self.query, self.key = tuple(query), tuple(key)

    def _products(self) -> list[fx.Node]:
        flow, found, stack = self.flow, [], [self.softmax]
        while stack:
            node = stack.pop()
            flow.visits += 1
            for n in [w for source in node.all_input_nodes for w in (source, *flow.writes_between(source, node))]:
                if n in self.toward or n.op != "call_function" or n in flow.uses or not flow.fact(n).frontier & ~_CORE:
                    continue
                self.toward[n] = node
                name = _base_name(n)
                if name in _PRODUCTS and len(flow._factors(n, name)) >= 2:
                    found.append(n)
                elif name not in _SOFTMAX:
                    stack.append(n)
        return found

    def _note_positions(self, pairs: list[tuple[fx.Node, list[fx.Node]]]) -> None:
        """Beside a product of two activations, one with a table of positions is no attention of its own."""
        fact = self.flow.fact
        for _, operands in pairs:
            fixed = [n for n in operands if not fact(n).live]
            if len(fixed) == 1:
                self.flow.positions |= fact(fixed[0]).frontier

    def _path(self, product: fx.Node) -> list[fx.Node]:
        path = [product]
        while path[-1] is not self.softmax:
            path.append(self.toward[path[-1]])
        return path

    def _key_side(self, product: fx.Node, operands: list[fx.Node]) -> int | None:
        dim = _dim(self.softmax)
        if dim < -2 or not all(_keeps_axes(before, after, dim) for before, after in pairwise(self._path(product))):
            return self.flow.splitter.key_side(product, operands, self.softmax, set(self.toward))
        if _base_name(product) == "einsum":
            terms, _, out = str(product.args[0]).replace(" ", "").partition("->")
            owners = [k for k, term in enumerate(terms.split(",")) if out and out[dim] in term]
            return owners[0] if len(owners) == 1 else None
        return 1 if dim == -1 else 0


def _keeps_axes(before: fx.Node, after: fx.Node, dim: int) -> bool:
    """The last two axes are the same two after the op; along `dim` it may cut off, pad or append."""
    name, old, new = _base_name(after), _shape(before), _shape(after)
    if name in _RELAYS:
        return False
    if name in _RESHAPES:
        return old[-2:] == new[-2:]
    at = len(old) + dim
    return len(old) == len(new) and old[:at] == new[:at] and old[at + 1 :] == new[at + 1 :]


# ── the exact split of a fused weight ────────────────────────────────────────────────────────────────────────────────

_FEW_ELEMENTS = 1 << 20  # above it, a run on shorter sequences is tried first
_MOST_ELEMENTS = 1 << 24  # float64 elements that one run may hold: 128 MiB, and as much again for the gradients
_FRESH = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
_SAME = frozenset({  # what says nothing of which feature depends on which: seen as the identity
    "dropout", "alpha_dropout", "feature_dropout", "masked_fill", "clamp", "clamp_min", "clamp_max", "hardtanh", "relu",
    "layer_norm", "rms_norm", "group_norm", "to", "_to_copy", "type_as", "float", "double", "half", "bfloat16",
})  # fmt: skip


class _Undecided(Exception):
    """Why a fused weight could not be split, in words."""


class _Splitter:
    """Runs a few nodes of the graph on small random tensors, and asks gradients what depends on what."""

    def __init__(self, flow: _Flow) -> None:
        self.flow = flow
        self.values: dict[fx.Node, Any] = {}  # integers and masks of the real run, as far as they can be recomputed
        self.known: dict[Any, Any] = {}  # structure → result: equal layers are run once
        self.runs = 0

    def features(self, use: Use, target: _Target) -> frozenset[int]:
        """The output features of a use (row-major over its out dims) that reach the target.

        Raises:
            _Undecided: the nodes between them cannot be run.
        """
        start, region = use.node, self._region(use.node, target)
        assert use.call is not None
        dims = tuple(d % len(_shape(start)) for d in use.call.out_dims)
        key = ("features", dims, self._structure([start], region, target))
        if key not in self.known:
            self.known[key] = self._features(start, region, target, dims)
        found = self.known[key]
        if isinstance(found, str):
            raise _Undecided(found)
        return found

    def key_side(self, product: fx.Node, factors: list[fx.Node], softmax: fx.Node, between: set[fx.Node]) -> int | None:
        """0 or 1: the factor that owns the softmaxed axis, so that a whole row of scores sees more of it than one."""
        mine = {n for n in between if _base_name(n) not in _PRODUCTS} | {product}
        region = sorted(mine, key=self.flow.order.__getitem__)
        target = _Target(softmax, softmax.all_input_nodes[0])
        key = ("side", self._structure(factors, region, target), repr(softmax.args[1:]), repr(softmax.kwargs))
        if key not in self.known:
            try:
                self.known[key] = self._key_side(factors, region, target)
            except _Undecided:
                self.known[key] = None
        return self.known[key]

    def _region(self, start: fx.Node, target: _Target) -> list[fx.Node]:
        """The nodes from the use (not with it) to the target, in order."""
        flow, bit = self.flow, self.flow.bit[start]
        region: set[fx.Node] = set()
        stack = [(target.reader, target.node)]
        while stack:
            reader, read = stack.pop()
            for node in (read, *flow.writes_between(read, reader)):
                if node is start or node in region or not flow.fact(node).frontier & bit:
                    continue
                flow.visits += 1
                region.add(node)
                stack += [(node, n) for n in node.all_input_nodes]
        return sorted(region, key=flow.order.__getitem__)

    def _structure(self, starts: list[fx.Node], region: list[fx.Node], target: _Target) -> tuple:
        """Equal for two places in the graph that do the same with tensors of the same shapes."""
        slots: dict[fx.Node, str] = {node: f"%{k}" for k, node in enumerate([*starts, *region])}

        def name(node: fx.Node) -> str:
            if node not in slots:
                value: Any = node.meta.get("val")
                same = isinstance(value, torch.Tensor) and _is_float(value)
                slots[node] = f"{tuple(value.shape)} {value.dtype}" if same else node.name
            return slots[node]

        shapes = tuple(_shape(node) for node in starts)
        steps = tuple((node.target, repr(fx.node.map_arg((node.args, node.kwargs), name))) for node in region)
        return shapes, steps, name(target.node), target.part

    def _features(self, start: fx.Node, region: list[fx.Node], target: _Target, dims: tuple[int, ...]) -> Any:
        if target.node is start:
            region = []
        elif target.node not in region:
            return frozenset()
        problem = ""
        for smaller in self._sizes(start, region, dims):
            try:
                run = _Run(self, [start], region, smaller)
                (gradient,) = run.gradients(target, [run.noise(run.values[target.node])])
            except _Undecided as why:
                problem = str(why)
            except Exception as why:  # any op of any model may be in there
                problem = f"the nodes behind it cannot be run alone: {type(why).__name__}: {why}".partition("\n")[0]
            else:
                rest = [d for d in range(gradient.ndim) if d not in dims]
                width = math.prod(gradient.shape[d] for d in dims)
                reached = (gradient != 0).permute(*rest, *dims).reshape(-1, width).any(0)
                return frozenset(reached.nonzero().flatten().tolist())
        return problem or f"that takes {self._elements(start, region) * 8 / 2**30:.1f} GiB: pass shorter example inputs"

    def _elements(self, start: fx.Node, region: list[fx.Node]) -> int:
        made = [node for node in region if _base_name(node) not in _ALIASES]
        return sum(math.prod(_shape(node)) for node in (start, *made))

    def _sizes(self, start: fx.Node, region: list[fx.Node], dims: tuple[int, ...]) -> Iterator[dict[int, int]]:
        """What to make smaller: nothing, or the batch and sequence sizes, if no feature axis has the same size."""
        total = self._elements(start, region)
        shape = _shape(start)
        rest = [n for d, n in enumerate(shape) if d not in dims]
        smaller = {n: 2 for n in rest if n > 2}
        if total > _FEW_ELEMENTS and smaller and not any(shape[d] in smaller for d in dims):
            yield smaller
            flat = math.prod(rest), math.prod(min(n, 2) for n in rest)
            if flat[0] not in shape:
                yield {**smaller, flat[0]: flat[1]}
        if total <= _MOST_ELEMENTS:
            yield {}

    def _key_side(self, factors: list[fx.Node], region: list[fx.Node], target: _Target) -> int | None:
        if sum(math.prod(_shape(node)) for node in region) > _MOST_ELEMENTS:
            return None
        dim = _dim(target.reader)
        try:
            run = _Run(self, factors, region, {})
            for element in run.places(run.values[target.node], 4):
                counts = [run.count(target, element), run.count(target, element, dim)]
                if all(counts[0]):
                    break
        except Exception:  # any op of any model may be in there
            return None
        if not all(counts[0]):
            return None
        # In banded attention the chunks overlap: a query may be there twice, its keys many times.
        grown = [whole / single for single, whole in zip(*counts, strict=True)]
        return next((k for k in (0, 1) if grown[k] >= 2 * grown[1 - k]), None)

    # Values that are not random: integers and masks.

    def value(self, node: fx.Node, depth: int = 0) -> Any:
        """What the node was in the captured run, where parameters, inputs and cheap ops say it; else `_Undecided`."""
        if node not in self.values:
            try:
                self.values[node] = self._recompute(node, depth)
            except _Undecided as problem:
                self.values[node] = problem
        if isinstance(self.values[node], _Undecided):
            raise self.values[node]
        return self.values[node]

    def _recompute(self, node: fx.Node, depth: int) -> Any:
        unknown = _Undecided("an index that decides it has no value here (a model on the meta device)")
        capture = self.flow.capture
        if node in capture.tensors:
            tensor = capture.tensors[node]
            if tensor.is_meta or tensor.numel() > _FEW_ELEMENTS:
                raise unknown
            return tensor.detach().cpu().clone()
        written = _written(node) or self.flow.root.get(node) in self.flow.writes
        if node.op != "call_function" or depth > 50 or written or self.flow.fact(node).frontier:
            raise unknown
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.value(n, depth + 1))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as problem:
            raise unknown from problem


class _Run:
    """`region` run once on random float64 tensors, with gradients for the values of `starts`."""

    def __init__(
        self, splitter: _Splitter, starts: list[fx.Node], region: list[fx.Node], smaller: dict[int, int]
    ) -> None:
        splitter.runs += 1
        self.splitter, self.smaller = splitter, smaller
        self.random = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.enable_grad():
            self.starts = [self._draw(_shape(node), torch.float64).requires_grad_() for node in starts]
            # A leaf cannot be written in place, a copy of it can.
            self.values: dict[fx.Node, Any] = {n: leaf * 1 for n, leaf in zip(starts, self.starts, strict=True)}
            for node in region:
                self.values[node] = self._step(node)

    def gradients(self, target: _Target, cotangents: list[torch.Tensor]) -> list[torch.Tensor]:
        out = self.values[target.node]
        if target.part is not None:
            out, cotangents = out.narrow(*target.part), [c.narrow(*target.part) for c in cotangents]
        found = torch.autograd.grad(out, self.starts, cotangents, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for g, s in zip(found, self.starts, strict=True)]

    def places(self, scores: torch.Tensor, how_many: int) -> Iterator[tuple[int, ...]]:
        """Some elements of the scores; one may be the row's maximum, which is subtracted from itself."""
        for k in range(how_many):
            yield tuple((n // 2 + k) % n for n in scores.shape)

    def count(self, target: _Target, place: tuple[int, ...], dim: int | None = None) -> list[int]:
        """How many elements of each start one element of the target depends on, or its whole row along `dim`."""
        cotangent = torch.zeros_like(self.values[target.node])
        row = None if dim is None else dim % cotangent.ndim
        cotangent[tuple(slice(None) if d == row else k for d, k in enumerate(place))] = 1
        return [int((g != 0).sum()) for g in self.gradients(target, [cotangent])]

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, dtype=like.dtype, device="cpu", generator=self.random)

    def _draw(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        dtype = torch.complex128 if dtype.is_complex else torch.float64
        sizes = [self.smaller.get(n, n) for n in shape]
        return torch.randn(sizes, dtype=dtype, device="cpu", generator=self.random)

    def _step(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._input)
        args, kwargs = self._localise(args), self._localise(kwargs)
        name = _base_name(node)
        if name in _FRESH:
            return self._draw(_shape(node), torch.float64) * 0
        if name in _SAME and isinstance(args[0], torch.Tensor) and _is_float(args[0]):
            wanted = [self.smaller.get(n, n) for n in _shape(node)]
            return args[0] if list(args[0].shape) == wanted else args[0].expand(wanted)
        if name == "where" and len(args) == 3:
            return args[1] + args[2]
        return self._check(node, _in_double(node.target(*args, **kwargs)))  # type: ignore[operator]

    def _check(self, node: fx.Node, result: Any) -> Any:
        wanted = tuple(self.smaller.get(n, n) for n in _shape(node))
        if self.smaller and isinstance(result, torch.Tensor) and tuple(result.shape) != wanted:
            raise _Undecided("its parts can only be told apart at full size: pass shorter example inputs")
        return result

    def _localise(self, arg: Any) -> Any:
        """Devices become the CPU, floating dtypes float64, and sizes the smaller ones."""
        if isinstance(arg, torch.device):
            return torch.device("cpu")
        if isinstance(arg, torch.dtype):
            return torch.float64 if arg.is_floating_point else torch.complex128 if arg.is_complex else arg
        if isinstance(arg, dict):
            return {k: self._localise(v) for k, v in arg.items()}
        if isinstance(arg, list):  # sizes come in lists; a single integer may be a dim or an index
            return [self._localise(self.smaller.get(a, a) if type(a) is int else a) for a in arg]
        if isinstance(arg, tuple):
            return tuple(self._localise(a) for a in arg)
        return arg

    def _input(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._outside(node)
        return self.values[node]

    def _outside(self, node: fx.Node) -> Any:
        value: Any = node.meta.get("val")
        if _is_float(value):
            many = isinstance(value, list | tuple)
            drawn = [self._draw(v.shape, v.dtype) if _is_float(v) else v for v in (value if many else [value])]
            return drawn if many else drawn[0]
        try:
            return self.splitter.value(node)
        except _Undecided:
            if not isinstance(value, torch.Tensor) or not self.splitter.flow.fact(node).live:
                raise
        # Which token goes where is up to the data; which feature goes where never is.
        return torch.zeros([self.smaller.get(n, n) for n in value.shape], dtype=value.dtype, device="cpu")


def _in_double(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_in_double(v) for v in value)
    if _is_float(value):
        return value.to(torch.complex128 if value.dtype.is_complex else torch.float64)
    return value


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_ATTENTION = (QUERY, KEY, VALUE)


class _Labeller:
    """From the flow to labels: attention before MLP before router before lm_head."""

    def __init__(self, program: Program) -> None:
        self.flow = _Flow(program)
        self.targets: dict[fx.Node, dict[str, list[_Target]]] = {}
        self.downs: set[fx.Node] = set()
        self.unclear: set[fx.Node] = set()
        self.gates = 0  # bits of the uses that gate an attention's result
        self.layouts = {use.weight: use.weight.layout for uses in self.flow.uses.values() for use in uses}
        self.rows: dict[Any, list[int] | None] = {}
        for core in self.flow.cores:
            for role, targets in zip(_ATTENTION, (core.query, core.key, core.value), strict=True):
                for target in targets:
                    self._aim(role, target)
        for node, fact in self.flow.inputs.items():
            self._mlp(node, fact)

    def labels(self) -> dict[Use, tuple[Label, ...]]:
        found = {}
        for node, uses in self.flow.uses.items():
            for use in uses:
                found[use] = self._use_labels(node, use)
        self._share_with_positions(found)
        return found

    def _aim(self, role: str, target: _Target, but: int = 0) -> None:
        fact = self.flow.fact(target.node)
        if fact.stream:  # the residual stream itself is read: it is nobody's projection
            return
        for node in self.flow.uses_in(fact.frontier & ~but):
            if self._multiplies_plainly(node):
                self.targets.setdefault(node, {}).setdefault(role, []).append(target)

    def _multiplies_plainly(self, node: fx.Node) -> bool:
        return _base_name(node) in _PLAIN_PRODUCTS

    def _mlp(self, node: fx.Node, fact: _Fact) -> None:
        flow, bit = self.flow, self.flow.bit[node]
        if fact.stream or not fact.acts or not self._multiplies_plainly(node):
            return
        if fact.frontier & (_CORE | _MIX):
            for act in fact.acts if fact.frontier & _CORE else ():
                self.gates |= act.origins
            return
        origins = 0
        for act in fact.acts:
            origins |= act.origins
        other = [n for n in flow.uses_in(origins) if not self._multiplies_plainly(n)]
        if bit & flow.added:
            fits = all(flow._is_depthwise(n) for n in other)
        else:  # a block on its own, as between two towers: heads, poolers and scalar gates look much like it
            own = {use.weight for use in flow.uses[node]}
            repeats = any(use.weight in own for n in flow.uses_in(origins) for use in flow.uses[n])
            fits = bool(bit & flow.used) and not bit & (flow.bending | flow.chosen) and not other and not repeats
        if not fits:
            return
        if not all(act.clear for act in fact.acts):
            self.unclear |= {node, *flow.uses_in(origins)}
            return
        self.downs.add(node)
        for act in fact.acts:
            self._aim(GATE if act.up else UP, act.gate)
            if act.up:  # in `up * x * sigmoid(x)` the factor beside the sigmoid holds the gate too
                gate, up = flow.fact(act.gate.node).frontier, flow.fact(act.up.node).frontier
                self._aim(UP, act.up, but=gate if up & ~gate & -_FIRST_USE else 0)

    # One use.

    def _use_labels(self, node: fx.Node, use: Use) -> tuple[Label, ...]:
        role = self._by_form(node, use)
        aims = self.targets.get(node, {})
        inner = self._by_input(node)
        if role or not aims or (inner == OUTPUT and not set(aims) & set(_ATTENTION)):
            return self._whole(use, role or inner or self._by_end(node))
        if inner and (inner == OUTPUT or not set(aims) & set(_ATTENTION)):
            return self._whole(use, OTHER, f"it looks like {inner} by what feeds it, like {min(aims)} by what it feeds")
        if len(aims) == 1 and not self._may_be_a_part(node, aims):
            return self._whole(use, *aims)
        return self._split(use, aims)

    def _by_form(self, node: fx.Node, use: Use) -> str:
        if use.form in _CONVS:
            return CONV
        if use.form in _LOOKUPS:
            return EMBEDDING
        return "" if self._multiplies_plainly(node) else OTHER

    def _by_input(self, node: fx.Node) -> str:
        fact = self.flow.inputs[node]
        if fact.frontier & _CORE and not fact.stream:
            return OUTPUT
        return DOWN if node in self.downs else ""

    def _by_end(self, node: fx.Node) -> str:
        flow, bit = self.flow, self.flow.bit[node]
        if bit & flow.chosen:
            return ROUTER
        return LM_HEAD if bit & flow.out and not bit & (flow.used | flow.added) else OTHER

    def _may_be_a_part(self, node: fx.Node, aims: dict[str, list[_Target]]) -> bool:
        """It is sliced, and something beside its one target reads it."""
        flow, bit = self.flow, self.flow.bit[node]
        alone = set(aims) <= set(_ATTENTION) and not bit & (flow.used | flow.out)
        return bool(bit & flow.cut) and not alone

    def _whole(self, use: Use, role: str, reason: str = "") -> tuple[Label, ...]:
        sides = use.call.sides if use.call else ""
        seen = math.prod(n for n, side in zip(use.view.shape, sides, strict=False) if side == "o")
        rows = self._rows_of(use) if sides and seen < self.layouts[use.weight].size("o") else None
        reason = reason or (self._why_other(use) if role == OTHER else "")
        return (Label(role, tuple(sorted(set(rows))) if rows else None, reason),)

    def _rows_of(self, use: Use) -> list[int] | None:
        """The weight's row of each output feature of the use."""
        if use.call is None:
            return None
        layout = self.layouts[use.weight]
        key = layout, use.view, use.call.sides
        if key not in self.rows:
            placement = place(*key)
            self.rows[key] = None if placement is None or placement.swapped else placement.rows()
        return self.rows[key]

    def _split(self, use: Use, aims: dict[str, list[_Target]]) -> tuple[Label, ...]:
        rows = self._rows_of(use)
        if rows is None:
            return self._whole(use, OTHER, f"it has parts ({', '.join(aims)}), and they are no rows of the weight")
        try:
            reached = {
                role: frozenset().union(*(self.flow.splitter.features(use, t) for t in targets))
                for role, targets in aims.items()
            }
        except _Undecided as problem:
            return self._whole(use, OTHER, f"its parts ({', '.join(aims)}) cannot be told apart: {problem}")
        parts, contested = _disjoint(reached)
        rest = frozenset(range(len(rows))) - contested.union(*parts.values())
        everything = [(role, features, "") for role, features in parts.items()]
        everything.append((OTHER, contested, f"the same features feed {' and '.join(aims)}"))
        everything.append((OTHER, rest, f"these features do not feed {' or '.join(aims)}"))
        return self._labels_of_parts(use, rows, [part for part in everything if part[1]])

    def _labels_of_parts(
        self, use: Use, rows: list[int], parts: list[tuple[str, frozenset[int], str]]
    ) -> tuple[Label, ...]:
        if len(parts) == 1:
            return self._whole(use, parts[0][0], parts[0][2])
        labels: dict[str, Label] = {}
        for role, features, reason in parts:
            own = {rows[k] for k in features}
            if role in labels:
                own |= set(labels[role].rows or ())
                reason = f"{labels[role].reason}; {reason}"
            labels[role] = Label(role, tuple(sorted(own)), reason)
        return tuple(labels.values())

    def _why_other(self, use: Use) -> str:
        flow, node = self.flow, use.node
        bit, fact = flow.bit[node], flow.inputs[node]
        if not self._multiplies_plainly(node):
            return f"{use.form} multiplies inside one op, where no role can be seen"
        if node in self.unclear:
            return "it belongs to a gated block of which either factor could be the gate"
        if bit & self.gates:
            return "it gates the result of an attention"
        if bit & flow.positions:
            return "it multiplies a table of positions, no activations"
        if bit & flow.mixed:
            return "it feeds a product of activations that is no softmax attention (a linear attention, a state space)"
        if fact.frontier & _MIX and not fact.stream:
            return "it multiplies what comes out of a product of activations that is no softmax attention"
        if not bit & (flow.used | flow.out):
            return "its result reaches neither another weight nor the output"
        if bit & flow.added:
            return "it is added to the residual stream, and is part of no attention or MLP"
        return "it feeds no attention, MLP, router or output of its own"

    def _share_with_positions(self, found: dict[Use, tuple[Label, ...]]) -> None:
        """A query weight that also multiplies a table of positions (DeBERTa's shared keys) is the query there too."""
        for use, labels in found.items():
            if labels[0].role != OTHER or not self.flow.bit[use.node] & self.flow.positions:
                continue
            others = [found[u] for u in use.weight.uses if u in found and u.view == use.view]
            same = {labels for labels in others if labels[0].role != OTHER}
            if len(same) == 1:
                found[use] = same.pop()


def _disjoint(reached: dict[str, frozenset[int]]) -> tuple[dict[str, frozenset[int]], frozenset[int]]:
    """Attention before MLP; what several roles claim after that is contested."""
    reached = dict(reached)
    if GATE in reached and reached[GATE] == reached.get(UP):  # x * f(x) on the same features gates with nothing else
        del reached[GATE]
    elif GATE in reached and reached[GATE] < reached.get(UP, frozenset()):  # up * x * f(x)
        reached[UP] -= reached[GATE]
    attention = frozenset().union(*(features for role, features in reached.items() if role in _ATTENTION))
    reached = {r: f if r in _ATTENTION else f - attention for r, f in reached.items()}
    claims = Counter(k for features in reached.values() for k in features)
    contested = frozenset(k for k, times in claims.items() if times > 1)
    return {r: f - contested for r, f in reached.items()}, contested
