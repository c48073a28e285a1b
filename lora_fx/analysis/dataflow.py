"""What every value in a captured graph comes from: one walk, in the graph's order.

For every node it notes which uses of weights its value comes from, never looking past a use, and whether it is in the
residual stream: that is the sum of everything before it, so it says nothing of any one use. On the way it finds the
attentions, with their operands, and the nonlinearities, with what they are multiplied by.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

from torch import fx

from lora_fx.analysis.feature_split import Splitter, Target
from lora_fx.graph.forms import FORMS
from lora_fx.graph.nodes import PRODUCTS, base_name, dim_of, is_float, looked_into, operands, shape_of, written_by
from lora_fx.graph.program import Program, Use

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
_REDUCES = frozenset({"sum", "mean", "cumsum", "nansum", "nanmean", "logsumexp", "logcumsumexp", "cumprod", "prod"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"})
_DENSE_PRODUCTS = PRODUCTS | {"mv", "inner", "addmv", "chain_matmul", "linalg_multi_dot"}

_INPUT, CORE, MIX = 1, 2, 4  # what a value may come from beside uses: model input, attention, another product
FIRST_USE = 8


def union(bits: Iterable[int]) -> int:
    return reduce(operator.or_, bits, 0)


def multiplies_plainly(node: fx.Node) -> bool:
    """Whether it is a matmul whose role, as a weight's, is told by what is around it."""
    name = base_name(node)
    return not FORMS[name].role if name in FORMS else name in _DENSE_PRODUCTS


@dataclass(frozen=True, eq=False)
class _Act:
    """A nonlinearity behind a value: f(gate), and the factor beside it where there is one."""

    gate: Target
    up: Target | None
    origins: int  # the uses it comes from
    clear: bool = True


@dataclass(slots=True)
class Fact:
    """What a node's value comes from, looking no further than the nearest uses."""

    live: bool = False  # it depends on the model's inputs
    frontier: int = 0  # the nearest uses, a bit each
    above: int = 0  # every use before those
    stream: bool = False  # it is a residual sum, or made of one
    bent: bool = False  # a nonlinearity lies between the uses and it
    weighs: bool = False  # it comes out of a softmax or a top-k: a weighting, no feature
    softmax: fx.Node | None = None  # it is this softmax, perhaps masked, scaled or sliced
    origin: fx.Node | None = None  # the node that it is an elementwise function of
    acts: tuple[_Act, ...] = ()
    pair: frozenset[fx.Node] = frozenset()  # the origins of two activations of which it is the plain product
    spectral: bool = False  # it has been through a Fourier transform: what comes from one token is everywhere


@dataclass(frozen=True)
class _Core:
    """One attention: its operands."""

    query: tuple[Target, ...]
    key: tuple[Target, ...]
    value: tuple[Target, ...]


class Flow:
    """One walk over the graph, in its order; linear, since nothing looks past a use."""

    def __init__(self, program: Program) -> None:
        assert program.capture is not None
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.order = {node: k for k, node in enumerate(self.nodes)}
        self.capture = program.capture
        self.splitter = Splitter(self)
        self.uses: dict[fx.Node, list[Use]] = {}
        for use in sorted((u for u in program.uses if u.multiplies), key=lambda u: self.order[u.node]):
            self.uses.setdefault(use.node, []).append(use)
        self.bit = {node: FIRST_USE << k for k, node in enumerate(self.uses)}
        self.at = {bit: node for node, bit in self.bit.items()}
        self._facts: dict[fx.Node, Fact] = {}
        self.inputs: dict[fx.Node, Fact] = {}  # what each use multiplies its weight with
        self.cores: list[_Core] = []
        self.root: dict[fx.Node, fx.Node] = {}  # the tensor that a view looks into
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        self.over: dict[fx.Node, Fact] = {}  # what was written into a tensor so far
        # Bits of the uses that …
        self.added = 0  # … are added to the residual stream
        self.used = 0  # … feed another use
        self.bending = 0  # … feed a nonlinearity
        self.chosen = 0  # … feed a top-k
        self.out = 0  # … reach the model's output
        self.unmixed = 0  # … reach it in no product with other activations
        self.cut = 0  # … are sliced
        self.operands = 0  # … feed an attention
        self.mixed = 0  # … feed a product of activations that is no attention
        self.positions = 0  # … multiply a table of relative positions
        self.visits = 0
        for node in self.nodes:
            self._visit(node)

    def uses_in(self, bits: int) -> Iterator[fx.Node]:
        bits &= -FIRST_USE
        while bits:
            lowest = bits & -bits
            yield self.at[lowest]
            bits ^= lowest

    def _visit(self, node: fx.Node) -> None:
        self.visits += 1
        if node.op == "output":
            returned = [self.fact(source) for source in node.all_input_nodes]
            self.out |= union(fact.frontier for fact in returned)
            self.unmixed |= union(fact.frontier for fact in returned if not fact.frontier & MIX)
            return
        if node.op != "call_function":
            given = node.op == "placeholder" and node not in self.capture.tensors
            floats = given and is_float(node.meta.get("val"))
            self._facts[node] = Fact(live=given, frontier=_INPUT if floats else 0, origin=node)
            return
        self._facts[node] = self._fact(node, base_name(node))
        self._note_aliases(node)

    def _fact(self, node: fx.Node, name: str) -> Fact:
        reads = [self.fact(n) for n in node.all_input_nodes]
        after = Fact(live=any(f.live for f in reads), above=union(f.frontier | f.above for f in reads), origin=node)
        if node in self.uses:
            return self._use(node, name, after)
        if "scaled_dot_product" in name or name in _FUSED_ATTENTION:
            q, k, v = ((Target(node, operand),) for operand in operands(node)[:3])
            return self._core(_Core(q, k, v), after)
        indices = (user for user in node.users if base_name(user) == "getitem" and user.args[1] == 1 and user.users)
        if name in _CHOICES or (name == "max" and any(indices)):  # of the stream or of a product it only sorts
            told = [f for f in reads if not f.stream and not f.frontier & (MIX | CORE)]
            self.chosen |= union(f.frontier for f in told if not f.pair and not f.spectral)
            self.mixed |= union(f.frontier for f in told if f.pair or f.spectral)
        if not is_float(node.meta.get("val")):
            return Fact(live=after.live, origin=node)
        found = None
        if name in PRODUCTS or name == "linear":  # which is no use: its weight is an activation
            found = self._attention(node, name, after) or self._mix(node, name, after)
        return found or self._plain(node, name, after)

    # A use: what is behind it stays behind.

    def _use(self, node: fx.Node, name: str, after: Fact) -> Fact:
        read = {u.call.x for u in self.uses[node] if u.call is not None} or set(node.all_input_nodes)
        fact = _join([self.fact(n) for n in read if isinstance(n, fx.Node)])
        if name in PRODUCTS and (core := self._attention(node, name, after)) is not None:
            fact = core  # a weight inside the second product: p, v and W in one einsum
        self.inputs[node] = fact
        self.used |= fact.frontier
        self.mixed |= fact.frontier if fact.pair and not fact.stream else 0
        after.frontier = self.bit[node]
        if self.is_depthwise(node) and not fact.stream:  # features stay apart: it is seen through
            after.frontier |= fact.frontier
            after.bent, after.acts = fact.bent, fact.acts
        if any(self.fact(n).frontier for n in node.all_input_nodes if n not in read):  # addmm(residual, x, W)
            after.stream = True
            self.added |= after.frontier
        return after

    def is_depthwise(self, node: fx.Node) -> bool:
        use = self.uses[node][0]
        return use.form == "conv" and use.weight.shape[1] == 1 and use.weight.shape[0] > 1

    def _core(self, core: _Core, after: Fact) -> Fact:
        self.cores.append(core)
        read = [self.fact(target.node) for target in (*core.query, *core.key, *core.value)]
        self.operands |= union(fact.frontier for fact in read if not fact.stream)
        return replace(after, frontier=CORE)

    def factors(self, node: fx.Node, name: str) -> list[fx.Node]:
        """What a product multiplies, as far as it comes from uses or inputs."""
        factors = operands(node)[1:3] if name in ("baddbmm", "addmm", "addbmm") else operands(node)
        return [n for n in factors if self.fact(n).frontier]

    def _attention(self, node: fx.Node, name: str, after: Fact) -> Fact | None:
        """softmax(…)·v, where the softmax is one of products of activations."""
        factors = self.factors(node, name)
        weightings = [n for n in factors if self.fact(n).softmax is not None]
        if len(factors) < 2 or len(weightings) != 1:
            return None
        softmax = self.fact(weightings[0]).softmax
        assert softmax is not None
        scores = _Scores(self, softmax)
        if not scores.query:
            return None
        values = tuple(Target(node, n) for n in factors if n is not weightings[0])
        return self._core(_Core(scores.query, scores.key, values), after)

    def _mix(self, node: fx.Node, name: str, after: Fact) -> Fact | None:
        """Another product of activations: what comes out of it is made of tokens, not of features."""
        factors = self.factors(node, name)
        if len(factors) < 2:
            return None
        self.mixed |= union(self.fact(n).frontier for n in factors if not self.fact(n).stream)
        fact = self._plain(node, name, after)
        self._mixes(fact, node)
        return fact

    def _mixes(self, fact: Fact, node: fx.Node) -> None:
        """From here on it is made of tokens."""
        self.mixed |= 0 if fact.stream else fact.frontier
        fact.frontier |= MIX
        fact.bent, fact.acts, fact.origin, fact.softmax, fact.pair = False, (), node, None, frozenset()

    def _plain(self, node: fx.Node, name: str, after: Fact) -> Fact:
        sources = [n for n in node.all_input_nodes[: 1 if name in _LIKE else None] if self.fact(n).frontier]
        fact = _join([self.fact(n) for n in sources])
        fact.live = after.live
        cuts = name in _CUTS
        fact.origin = node if cuts or fact.origin is None else fact.origin
        if not fact.stream and cuts:
            self.cut |= fact.frontier
        if name in _SOFTMAX:
            fact.softmax, fact.weighs, fact.bent, fact.acts = node, True, False, ()
        elif name in _CHOICES:
            fact.weighs, fact.softmax = True, None
        if multiplies_plainly(node) and len(node.all_input_nodes) > len(sources):
            self.used |= fact.frontier  # by a computed weight, which is no use that could be adapted
        if name in _ADDS and len(sources) > 1:
            self._add(fact, sources)
        elif name in ("mul", "div") and len(sources) == 2 and not fact.stream:
            self._multiply(fact, node, *sources)
        elif name in _REDUCES and any(act.up for act in fact.acts) and not _normalizes(node):
            self._mixes(fact, node)  # a gated product over tokens, as linear attention sums f(k)·v
        fact.spectral |= name.startswith("fft_")
        if self._bends(node, name) and sources:
            self._bend(fact, node, name, sources[0])
        if fact.stream:
            fact.acts, fact.bent = (), False
        return fact

    def _add(self, fact: Fact, sources: list[fx.Node]) -> None:
        """A sum with something that lies before the uses of the other summand is the residual stream."""
        self._recur(fact, sources)
        for a in sources:
            for b in sources:
                older, branch = self.fact(a), self.fact(b)
                at = older.frontier & ~(CORE | MIX | (self.operands if branch.frontier & CORE else 0))
                # Where both come from one use, it is a recurrence within a block: a state space, a scan.
                if at & branch.above and not at & branch.frontier & -FIRST_USE:
                    fact.stream = True
                    self.added |= 0 if branch.stream else branch.frontier

    def _recur(self, fact: Fact, sources: list[fx.Node]) -> None:
        """A sum of gated products of the same uses that are other tokens': state = decay · state + f(k) · v."""
        facts = [self.fact(n) for n in sources]
        shared = reduce(operator.and_, (f.frontier for f in facts)) & -FIRST_USE
        if shared and len({f.origin for f in facts}) > 1 and any(act.up for f in facts for act in f.acts):
            self._mixes(fact, sources[0])

    @staticmethod
    def _bends(node: fx.Node, name: str) -> bool:
        if name in ("clamp", "clamp_min"):  # with zero below and nothing above it is a relu
            low, high = [*node.args[1:], None, None][:2]
            return bool(node.kwargs.get("min", low) == 0) and node.kwargs.get("max", high) is None
        return name in _BENDS

    def _bend(self, fact: Fact, node: fx.Node, name: str, source: fx.Node) -> None:
        if fact.stream or fact.frontier < FIRST_USE:
            return
        self.bending |= fact.frontier
        if fact.pair:
            self._mixes(fact, node)
            return
        fact.bent = True
        if name == "glu":
            dim, half = dim_of(node), shape_of(node)[dim_of(node)]
            up, gate = (Target(node, source, (dim, start, half)) for start in (0, half))
            fact.acts, fact.origin = (_Act(gate, up, fact.frontier),), node
        elif not fact.acts:
            fact.acts = (_Act(Target(node, source), None, fact.frontier),)

    def _multiply(self, fact: Fact, node: fx.Node, a: fx.Node, b: fx.Node) -> None:
        """f(gate) * up, unless one is an elementwise function of the other (x * sigmoid(x)) or only weighs."""
        left, right = self.fact(a), self.fact(b)
        scales = [self._scales(a, b), self._scales(b, a)]
        if scales[0] != scales[1]:
            kept, scale = (right, left) if scales[0] else (left, right)
            self.used |= scale.frontier & ~kept.frontier
            fact.frontier, fact.acts, fact.bent = kept.frontier, kept.acts, kept.bent
            fact.origin, fact.weighs, fact.softmax, fact.pair = kept.origin, kept.weighs, kept.softmax, kept.pair
            return
        features = left.frontier >= FIRST_USE and right.frontier >= FIRST_USE
        if left.origin is right.origin or not features:
            return
        gate, up = (a, b) if left.bent else (b, a)
        if self._is_pair(node, self.fact(gate), self.fact(up)):
            if left.pair or right.pair or base_name(node) == "div":
                self._mixes(fact, node)
            else:
                fact.pair = frozenset(f.origin for f in (left, right) if f.origin is not None)
                fact.weighs = False
            return
        acts = self.fact(gate).acts
        clear = left.bent != right.bent and all(act.up is None for act in acts)
        fact.acts = (_Act(Target(node, gate), Target(node, up), fact.frontier, clear),)

    @staticmethod
    def _is_pair(node: fx.Node, gate: Fact, up: Fact) -> bool:
        """A product of two activations of which neither gates the other, as in f(gate) · up or up · gate · f(gate)."""
        of_both = bool(up.pair) and gate.origin in up.pair
        return base_name(node) == "div" or not gate.bent or bool(gate.pair) or (bool(up.pair) and not of_both)

    def _scales(self, node: fx.Node, other: fx.Node) -> bool:
        """It weighs the other's features, all alike: a routing weight, a gate with one value a token.

        No outer product: that has features of both.
        """
        mine, theirs = shape_of(node), shape_of(other)
        one = mine[-1:] == (1,) and theirs[-1:] != (1,) and len(theirs) > 0
        one = one and all(k in (1, n) for k, n in zip(mine[::-1], theirs[::-1], strict=False))
        return one or (self.fact(node).weighs and self.fact(node).softmax is None and not self.fact(other).weighs)

    # Tensors written in place.

    def _note_aliases(self, node: fx.Node) -> None:
        source, written = looked_into(node), written_by(node)
        self.root[node] = node if source is None else self.root.get(source, source)
        new = self._facts[node]
        for root in {self.root.get(w, w) for w in written}:  # who reads it from now on reads what was written
            self.writes.setdefault(root, []).append(node)
            self.over[root] = _join([self.over[root], new]) if root in self.over else new

    def fact(self, node: fx.Node) -> Fact:
        """What is known of the node's value by now."""
        fact = self._facts[node]
        over = self.over.get(self.root.get(node, node))
        if over is None or over is fact or not is_float(node.meta.get("val")):
            return fact
        joined = _join([fact, over])
        joined.origin, joined.softmax = node, over.softmax
        return joined

    def writes_between(self, target: fx.Node, reader: fx.Node) -> list[fx.Node]:
        writes = self.writes.get(self.root.get(target, target), ())
        first, last = self.order[target], self.order[reader]
        return [w for w in writes if first < self.order[w] < last]


def _normalizes(node: fx.Node) -> bool:
    """It reduces each token's features to one number beside them, as a norm does."""
    (read,) = node.all_input_nodes[:1]
    return shape_of(node) == (*shape_of(read)[:-1], 1)


def _join(facts: list[Fact]) -> Fact:
    """What is known of a value computed from all of these."""
    joined = Fact()
    for f in facts:
        joined.live |= f.live
        joined.frontier |= f.frontier
        joined.above |= f.above
        joined.stream |= f.stream
        joined.bent |= f.bent
        joined.weighs |= f.weighs
        joined.pair |= f.pair
        joined.spectral |= f.spectral
    made_of = [f for f in facts if f.frontier]
    softmaxes, origins = {f.softmax for f in made_of}, {f.origin for f in made_of}
    joined.softmax = softmaxes.pop() if len(softmaxes) == 1 else None
    joined.origin = origins.pop() if len(origins) == 1 else None
    joined.acts = tuple(dict.fromkeys(act for f in made_of for act in f.acts))
    return joined


class _Scores:
    """Attention spelled out: the products q·kᵀ whose sum is the input of a softmax.

    The key is the operand that owns the softmaxed axis.
    """

    def __init__(self, flow: Flow, softmax: fx.Node) -> None:
        self.flow, self.softmax = flow, softmax
        self.toward: dict[fx.Node, fx.Node] = {}  # node → the one after it on the way to the softmax
        pairs = {p: factors for p in self._products() if len(factors := flow.factors(p, base_name(p))) == 2}
        live = {p: factors for p, factors in pairs.items() if all(flow.fact(n).live for n in factors)}
        if live:  # beside a product of two activations, one with a table of positions is no attention of its own
            fixed = [[n for n in factors if not flow.fact(n).live] for factors in pairs.values()]
            flow.positions |= union(flow.fact(alone[0]).frontier for alone in fixed if len(alone) == 1)
        sides = {p: self._key_side(p, factors) for p, factors in (live or pairs).items()}
        known = [(p, pairs[p], side) for p, side in sides.items() if side is not None]
        self.key = tuple(Target(p, factors[side]) for p, factors, side in known)
        self.query = tuple(Target(p, factors[1 - side]) for p, factors, side in known)

    def _products(self) -> list[fx.Node]:
        flow, found, stack = self.flow, [], [self.softmax]
        while stack:
            node = stack.pop()
            flow.visits += 1
            for n in [w for source in node.all_input_nodes for w in (source, *flow.writes_between(source, node))]:
                if n in self.toward or n.op != "call_function" or n in flow.uses or not flow.fact(n).frontier & ~CORE:
                    continue
                self.toward[n] = node
                name = base_name(n)
                if name in PRODUCTS and len(flow.factors(n, name)) >= 2:
                    found.append(n)
                elif name not in _SOFTMAX:
                    stack.append(n)
        return found

    def _key_side(self, product: fx.Node, factors: list[fx.Node]) -> int | None:
        dim, path = dim_of(self.softmax), [product]
        while path[-1] is not self.softmax:
            path.append(self.toward[path[-1]])
        if dim < -2 or not all(_keeps_axes(before, after, dim) for before, after in pairwise(path)):
            return self.flow.splitter.key_side(product, factors, self.softmax, set(self.toward))
        if base_name(product) == "einsum":
            terms, _, out = str(product.args[0]).replace(" ", "").partition("->")
            owners = [k for k, term in enumerate(terms.split(",")) if out and out[dim] in term]
            return owners[0] if len(owners) == 1 else None
        return 1 if dim == -1 else 0


def _keeps_axes(before: fx.Node, after: fx.Node, dim: int) -> bool:
    """The last two axes are the same two after the op; along `dim` it may cut off, pad or append."""
    name, old, new = base_name(after), shape_of(before), shape_of(after)
    if name in _RELAYS:
        return False
    if name in _RESHAPES:
        return old[-2:] == new[-2:]
    at = len(old) + dim
    return len(old) == len(new) and old[:at] == new[:at] and old[at + 1 :] == new[at + 1 :]
