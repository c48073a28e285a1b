"""Which sums of an ONNX graph are a linear op and branches beside it. They are only found here: `folding` rewrites.

    Add(op(x, W), Mul(up(down(x, A), B), s))     and     Sub(op(x, W), …)

Names cannot find a branch (the TorchScript exporter drops most of them): it is found by what it does, an Add of one
linear op of x and of a chain of two of the same x. Names then say whose it is: a model may have a bottleneck of its
own beside a linear layer, which is the same sum, and no adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch

from lora_fx.export.onnx.graphs import as_torch, attribute, order
from lora_fx.export.onnx.runtimes import refuse

REMEDY = "fold the torch model before it is exported; report the graph to lora_fx if it is a plain LoRA"

#: how PEFT, loralib, kohya and we call the two factors of an adapter
ADAPTER = re.compile(r"(?<![a-z])lora_(?:embedding_)?(?:[ab]|down|up)(?![a-z])|_lora_\w+\.[ab]\b", re.IGNORECASE)

_FLOATS = frozenset({"FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"})
_WHOLE = frozenset({"INT32", "INT64"})

#: ops that are evaluated: they take a number of steps that their inputs and outputs bound
_LINEAR = frozenset({
    "Add", "Cast", "CastLike", "Concat", "ConstantOfShape", "DequantizeLinear", "Div", "Expand", "Flatten", "Gather",
    "Mul", "Neg", "Pad", "Pow", "Range", "Reciprocal", "Reshape", "Shape", "Slice", "Split", "Sqrt", "Squeeze", "Sub",
    "Tile", "Unsqueeze", "Where",
})  # fmt: skip
_MADE = 2**24  # bytes that a file of any size may make of its constants
_TIMES = 16  # how many times its own bytes it may make
_EVALUATED = 10_000  # nodes

_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


class Kind(Enum):
    """How an op multiplies an activation with its constant: x·W, W·x, W[x] …"""

    RIGHT = auto()
    LEFT = auto()
    LOOKUP = auto()
    CONV = auto()
    DECONV = auto()


@dataclass(frozen=True)
class Form:
    """An op of ONNX that multiplies with a constant."""

    op: str
    kind: Kind
    place: int
    """Which of its first two inputs is the constant: the other one is the activation."""
    sides: str
    """Which of the constant's two axes the op takes for in, and which for out."""
    turn: str = ""
    """An attribute that says that the axes lie the other way round."""
    unless: str = ""
    """An attribute that makes another op of it."""


_FORMS = (
    Form("MatMul", Kind.RIGHT, 1, "io"),
    Form("MatMul", Kind.LEFT, 0, "oi"),
    Form("Gemm", Kind.RIGHT, 1, "io", turn="transB", unless="transA"),
    Form("Gemm", Kind.LEFT, 0, "oi", turn="transA", unless="transB"),
    Form("Gather", Kind.LOOKUP, 0, "io", unless="axis"),
    Form("Conv", Kind.CONV, 1, "oi"),
    Form("ConvTranspose", Kind.DECONV, 1, "io"),
)

#: the two ops of a branch beside an op, where they are not of its own kind
_BESIDE = {Kind.LOOKUP: (Kind.LOOKUP, Kind.RIGHT), Kind.DECONV: (Kind.CONV, Kind.DECONV)}

_WINDOW = ("strides", "pads", "dilations", "auto_pad", "output_padding", "output_shape", "group")


@dataclass(frozen=True)
class Op:
    """One linear op of an activation, with a constant."""

    node: Any
    form: Form
    scale: float
    path: tuple[Any, ...] = ()
    """The values from where it was looked for up to its product."""
    reshaped: bool = False
    """A Reshape lies on it."""

    @property
    def constant(self) -> Any:
        return self.node.inputs[self.form.place]

    @property
    def x(self) -> Any:
        return self.node.inputs[1 - self.form.place]

    @property
    def sides(self) -> str:
        """Of the constant's two axes, as it lies."""
        turned = self.form.turn and attribute(self.node, self.form.turn)
        return self.form.sides[::-1] if turned else self.form.sides

    @property
    def window(self) -> dict[str, Any]:
        """How a convolution moves over its input; without what is so by default."""
        found = {name: attribute(self.node, name) for name in _WINDOW}
        plain = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0}
        for name in (name for name, usual in plain.items() if {*(found[name] or ())} <= {usual}):
            found[name] = None
        return found | {"group": found["group"] or 1, "auto_pad": found["auto_pad"] or "NOTSET"}

    @property
    def groups(self) -> int:
        return int(self.window["group"])

    @property
    def stays(self) -> bool:
        """A convolution with a kernel of one element reads every position once."""
        moved = [self.window[name] for name in ("strides", "dilations", "pads")]
        return not any(moved) and self.window["auto_pad"] in ("NOTSET", "VALID")

    @property
    def convolves(self) -> bool:
        return self.form.kind in (Kind.CONV, Kind.DECONV)


@dataclass(frozen=True)
class Branch:
    """up(down(x, A), B)"""

    down: Op
    up: Op
    why: str = ""
    """What says that it is an adapter's."""

    @property
    def scale(self) -> float:
        return self.down.scale * self.up.scale

    def __neg__(self) -> Branch:
        return replace(self, up=replace(self.up, scale=-self.up.scale))


@dataclass(frozen=True)
class Term:
    """One Add or Sub of a sum."""

    add: Any
    rest: Any
    """The value that it adds to."""
    branch: Branch | None = None
    """What it adds; None for what stays."""


@dataclass(frozen=True)
class Site:
    """A use of a weight, and what is added to it: the last Add first."""

    base: Op
    terms: tuple[Term, ...]
    apart: bool = False
    """Something else reads a value between the product and the sum: that stays, and the sum gets nodes of its own."""

    @property
    def branches(self) -> list[Branch]:
        return [term.branch for term in self.terms if term.branch is not None]

    @property
    def key(self) -> Hashable:
        """Equal for sites that read one weight with one delta."""
        ops = (self.base, *(op for branch in self.branches for op in (branch.down, branch.up)))
        scales = tuple(branch.scale / self.base.scale for branch in self.branches)
        return tuple((op.constant, op.form, op.sides, op.groups) for op in ops), scales


class Reader:
    """Reads an ONNX graph, and changes nothing in it.

    Args:
        model: of onnx_ir, its functions inlined and its shapes inferred.
        place: the file, for errors.
        unnamed: a branch whose names say nothing of an adapter is taken for one, too.
    """

    def __init__(self, model: Any, place: str, unnamed: bool = False) -> None:
        self.model, self.place, self.unnamed = model, place, unnamed
        self.left: dict[Any, tuple[Op, Branch]] = {}
        """Add → the sum of a linear op and a branch without an adapter's names, which is not asked for."""
        self._inputs = {*model.graph.inputs}
        self._constants: dict[Any, torch.Tensor | None] = {}
        self._fixed = self._computed()
        held = [v.const_value.nbytes for graph in model.graphs() for v in graph.initializers.values() if v.const_value]
        self._bytes, self._nodes = _MADE + _TIMES * sum(held), _EVALUATED
        """What may still be evaluated."""

    def _computed(self) -> set[Any]:
        """The values that nodes compute of constants alone. A node reads what nodes before it have made."""
        from onnx_ir.convenience import get_const_tensor

        found: set[Any] = set()
        for node in self.model.graph.all_nodes():
            given = [v for v in node.inputs if v is not None and v not in found]
            if all(v not in self._inputs and get_const_tensor(v) is not None for v in given):
                found.update(node.outputs)
        return found

    def fixed(self, value: Any) -> bool:
        """No input of the graph can change it."""
        from onnx_ir.convenience import get_const_tensor

        return value in self._fixed or (value not in self._inputs and get_const_tensor(value) is not None)

    def constant(self, value: Any) -> torch.Tensor | None:
        """The numbers of a value that no input of the graph can change."""
        from onnx_ir.convenience import get_const_tensor

        if value is None or value in self._inputs:
            return None
        if (tensor := get_const_tensor(value)) is not None:
            return as_torch(tensor)
        if value not in self._fixed:
            return None
        if value not in self._constants:
            self._constants[value] = self._evaluate(value)
        return self._constants[value]

    def _evaluate(self, value: Any) -> torch.Tensor | None:
        import numpy
        import onnx
        import onnx_ir
        from onnx.reference import ReferenceEvaluator

        node = value.producer()
        if node is None or any(a.type == onnx_ir.AttributeType.GRAPH for a in node.attributes.values()):
            return None
        kind = op_type(node)
        if kind in _RANDOM or (kind == "Dropout" and self._drops(node)):
            return None
        inputs: dict[str, torch.Tensor] = {}
        for given in (v for v in node.inputs if v is not None):
            numbers = self.constant(given)
            if numbers is None:
                return None
            inputs[given.name] = numbers
        if not inputs:
            return None
        if kind in ("Transpose", "Identity"):  # numpy has no bfloat16
            (only,) = inputs.values()
            return only.permute(order(node, only.ndim))
        if kind not in _LINEAR or not self._affordable(node):
            return None
        try:
            proto = onnx_ir.to_proto(node)
            opsets = [onnx.helper.make_opsetid(*opset) for opset in self.model.opset_imports.items()]
            alone = onnx.helper.make_function("", "node", [*inputs], [*proto.output], [proto], opsets)
            evaluator: Any = ReferenceEvaluator(alone)
            outputs = evaluator.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}, {})
            return torch.from_numpy(numpy.array(outputs[list(node.outputs).index(value)]))
        except Exception:
            return None

    def _affordable(self, node: Any) -> bool:
        """Its outputs are known to be of a size that can be made.

        Raises:
            ExportError: all that was made is too much.
        """
        made = 0
        for value in node.outputs:
            sizes = (
                None if value.shape is None or value.dtype is None else [getattr(n, "value", n) for n in value.shape]
            )
            if sizes is None or not all(isinstance(size, int) for size in sizes):
                return False
            made += math.prod(sizes) * math.ceil(value.dtype.itemsize)
        self._bytes, self._nodes = self._bytes - made, self._nodes - 1
        if self._bytes < 0 or self._nodes < 0:
            reason = (
                f"its constants are computed by too much: the last node, {node.name or node.op_type}, makes {made:,} "
            )
            reason += f"bytes, and the file's own size bounds what may be made, as {_EVALUATED:,} nodes do"
            refuse(self.place, reason, "evaluate its constants first, as onnxscript.optimizer.fold_constants does")
        return True

    def _scalar(self, value: Any, beside: Any = None) -> float | None:
        """One number, which gives the value beside it no more axes."""
        tensor = self.constant(value)
        axes = 1 if beside is None or beside.shape is None else len(beside.shape)
        return float(tensor) if tensor is not None and tensor.numel() == 1 and tensor.ndim <= max(axes, 1) else None

    def shape(self, value: Any) -> tuple[int, ...]:
        """Of a constant of floating-point numbers; empty for anything else. An initializer is not read for that."""
        if value.const_value is not None and value not in self._inputs:
            floating = value.const_value.dtype.is_floating_point()
            return tuple(value.const_value.shape) if floating else ()
        tensor = self.constant(value)
        return tuple(tensor.shape) if tensor is not None and tensor.is_floating_point() else ()

    def matrix(self, op: Op) -> torch.Tensor:
        """The constant as (…, out, in), without the groups of a convolution."""
        tensor = self.constant(op.constant)
        assert tensor is not None, op.constant.name
        tensor = tensor.flatten(1) if op.convolves else tensor
        return tensor if op.sides == "oi" else tensor.mT

    def op(self, value: Any) -> Op | None:
        """The linear op that gives this value, looked at through scalar factors, casts and reshapes."""
        node = value.producer()
        if node is None or value is not node.outputs[0]:  # another one is a mask
            return None
        given, factor = self._step(node)
        if given is None:
            return self.linear(node)
        found = self.op(given)
        if found is None:
            return None
        reshaped = found.reshaped or op_type(node) == "Reshape"
        return replace(found, scale=found.scale * factor, path=(value, *found.path), reshaped=reshaped)

    def _step(self, node: Any) -> tuple[Any, float]:
        """The value that a node gives on, or None, and by what it multiplies that."""
        if self._gives_on(node):
            return node.inputs[0], 1.0
        if op_type(node) == "Neg":
            return node.inputs[0], -1.0
        for n, given in enumerate(node.inputs if op_type(node) == "Mul" else ()):
            if (by := self._scalar(node.inputs[1 - n], given)) is not None:
                return given, by
        by = self._scalar(node.inputs[1], node.inputs[0]) if op_type(node) == "Div" else None
        return (node.inputs[0], 1 / by) if by else (None, 1.0)

    def passes(self, node: Any, value: Any) -> bool:
        """A node gives on this value, times a number."""
        return self._step(node)[0] is value

    def _gives_on(self, node: Any) -> bool:
        """It gives its first input on, number by number."""
        kind = op_type(node)
        if kind == "Reshape":  # rows of x stay rows
            last = [value.shape[-1] if value.shape else None for value in (node.inputs[0], node.outputs[0])]
            return isinstance(last[0], int) and last[0] == last[1]
        return kind == "Identity" or (kind == "Cast" and _keeps(node)) or (kind == "Dropout" and not self._drops(node))

    def _drops(self, node: Any) -> bool:
        """A Dropout in training."""
        mode = node.inputs[2] if len(node.inputs) > 2 else None
        return mode is not None and self._scalar(mode) != 0

    def linear(self, node: Any) -> Op | None:
        """The node itself, where it multiplies an activation with a constant."""
        for form in _FORMS:
            if op_type(node) != form.op or (form.unless and attribute(node, form.unless)):
                continue
            constant = node.inputs[form.place]
            if constant is not None and len(self.shape(constant)) >= 2:
                alpha = attribute(node, "alpha")
                return Op(node, form, 1.0 if alpha is None else float(alpha), (node.outputs[0],))
        return None

    def _source(self, value: Any, reshapes: bool) -> Any:
        """The activation behind casts, and behind reshapes where they are allowed."""
        while (node := value.producer()) is not None and value is node.outputs[0] and self._gives_on(node):
            if op_type(node) == "Reshape" and not reshapes:
                break
            value = node.inputs[0]
        return value

    def sites(self) -> list[Site]:
        """Every use of a weight with branches, the last of the graph first.

        Raises:
            ExportError: a branch is there and cannot be folded.
        """
        found: list[Site] = []
        inside: set[Any] = set()
        for node in reversed(list(self.model.graph)):
            if op_type(node) in ("Add", "Sub") and node not in inside and (site := self._site(node)) is not None:
                found.append(site)
                inside.update(self._within(site.terms))
        return found

    def _within(self, terms: Sequence[Term]) -> Iterator[Any]:
        """The Adds that are of no other sum: one that something else reads is a sum itself."""
        for term in terms:
            yield term.add
            if self._shared(term.rest):
                return

    def _site(self, last: Any) -> Site | None:
        """The sum that ends in this Add. A base op, constants and branches may be added in any order."""
        terms: list[Term] = []
        value = last.outputs[0]
        while (term := self._term(value, bool(terms))) is not None:
            terms.append(term)
            value = term.rest
        base = self.op(value) if terms else None
        terms = [self._asked(term, base) for term in terms]
        while terms and terms[0].branch is None:
            terms.pop(0)
        if not terms:
            return None
        site = None if base is None or not base.scale else Site(base, tuple(terms))
        if site is None or not all(self._parallel(site.base, branch) for branch in site.branches):
            self._refuse_narrow(terms, value)
            return None
        self._refuse_quantised(site.base.constant)
        between = (*(term.rest for term in site.terms), *site.base.path)
        return replace(site, apart=any(self._shared(value) for value in between))

    def _asked(self, term: Term, base: Op | None) -> Term:
        """The term, with why its branch is an adapter's; without its branch where nothing says so: then that stays."""
        if term.branch is None:
            return term
        why = self._named(term.branch, base) or ("asked for by unnamed=True" if self.unnamed else "")
        if not why and base is not None and self._parallel(base, term.branch):
            self.left[term.add] = base, term.branch
        return replace(term, branch=replace(term.branch, why=why) if why else None)

    def _named(self, branch: Branch, base: Op | None) -> str:
        """The names that say that a branch is an adapter's."""
        found = [match.group() for op in (branch.down, branch.up) if (match := ADAPTER.search(self.names(op)))]
        if found:
            return f"named {' and '.join(dict.fromkeys(found))}"
        if base is None:
            return ""
        scope, peft, rest = scope_of(base.node).rpartition(".base_layer")
        inside = all(f"{scope_of(op.node)}.".startswith(f"{scope}.") for op in (branch.down, branch.up))
        if scope and peft and not rest and inside:
            return f"PEFT's, in {scope} beside its base_layer"
        if self.model.metadata_props.get("lora_fx.form") == "unfolded" and self.rank(branch) in self._ranks():
            return f"of rank {self.rank(branch)}, as the file's metadata says"
        return ""

    def adapters_of(self, node: Any) -> set[Any]:
        """The values that it reads that are an adapter's branches."""
        given = [value for value in node.inputs if value is not None]
        bases = [op for value in given if (op := self.op(value)) is not None]
        branches = {value: branch for value in given if (branch := self._branch(value)) is not None}
        named = {v for v, branch in branches.items() if self.unnamed or any(self._named(branch, b) for b in bases)}
        return named if len(named) < len(given) else set()

    def rank(self, branch: Branch) -> int:
        """How many features there are between its two ops."""
        sizes, down = self.shape(branch.down.constant), branch.down
        return (sizes[:2] if down.convolves else sizes[-2:])[down.sides.index("o")] // down.groups

    def _ranks(self) -> set[Any]:
        """Of the adapters that a file of ours says it has."""
        try:
            held = json.loads(self.model.metadata_props.get("lora_fx.weights", "{}"))
            return {adapter.get("rank") for own in held.values() for adapter in own}
        except (ValueError, AttributeError, TypeError, RecursionError):
            return set()

    def names(self, op: Op) -> str:
        """All that an op and its constant are called, and where in the model they are."""
        scopes = (op.node.metadata_props.get(key) for key in ("namespace", "pkg.torch.onnx.name_scopes"))
        held = [value.name for value in self._origins(op.constant)]
        return " ".join(name for name in (op.node.name, op.node.outputs[0].name, *held, *scopes) if name)

    def _origins(self, constant: Any) -> list[Any]:
        """All values that a constant is computed from, itself first."""
        found = dict.fromkeys([constant])
        for value in (queue := [constant]):
            node = value.producer()
            new = [v for v in (node.inputs if node is not None else ()) if v is not None and v not in found]
            found |= dict.fromkeys(new)
            queue += new
        return [*found]

    def _term(self, value: Any, within: bool) -> Term | None:
        """The Add or Sub that gives this value; one of a constant only within a sum that a branch ends."""
        add = value.producer()
        if add is None or op_type(add) not in ("Add", "Sub"):
            return None
        left, right = add.inputs
        pairs = ((left, right), (right, left)) if op_type(add) == "Add" else ((left, right),)
        found = []
        for rest, other in pairs:
            branch = self._branch(other)
            if branch is None or self.constant(rest) is not None or not _fits(other, rest):
                continue
            if not (branch.down.reshaped or branch.up.reshaped) or _alike(other, rest):
                found.append(Term(add, rest, branch if op_type(add) == "Add" else -branch))
        if found:  # a layer after a layer looks like a branch, too
            return next((term for term in found if term.branch and self._named(term.branch, None)), found[0])
        for rest, other in pairs:
            if within and self.constant(other) is not None:
                return Term(add, rest)
        return None

    def _branch(self, value: Any) -> Branch | None:
        """Two linear ops without a bias, one after the other."""
        up = self.op(value)  # its x is a product: never a lookup's
        down = None if up is None else self.op(up.x)
        return None if up is None or down is None or _biased(up.node) or _biased(down.node) else Branch(down, up)

    def _parallel(self, base: Op, branch: Branch) -> bool:
        """The branch is a low-rank delta of the weight, as far as a graph without sizes can tell."""
        down, up, kind = branch.down, branch.up, base.form.kind
        if (down.form.kind, up.form.kind) != _BESIDE.get(kind, (kind, kind)):
            return False
        ranks = {len(self.shape(op.constant)) for op in (base, down, up)}
        by_rows = not base.convolves and ranks == {2}  # elsewhere a Reshape would mix axes
        if not by_rows and (base.reshaped or down.reshaped or up.reshaped):
            return False
        if self._source(base.x, by_rows) is not self._source(down.x, by_rows):
            return False
        if len(self.shape(base.constant)) < max(len(self.shape(op.constant)) for op in (down, up)):
            return False  # its product has axes that the base's has not
        if not base.convolves:
            return True
        wide, point = (down, up) if base.form.kind is Kind.CONV else (up, down)
        own, other, last = (self.shape(op.constant)[2:] for op in (base, wide, point))
        same = wide.groups == point.groups == base.groups and own == other
        return same and wide.window == base.window and point.stays and {*last} <= {1}

    def _refuse_narrow(self, terms: Sequence[Term], value: Any) -> None:
        """Two linear ops that are added to something else than a linear op of their input, and look like LoRA."""
        node = value.producer()
        what = "an input" if node is None else f"{node.domain}.{node.op_type}".lstrip(".")
        for term in terms:
            if term.branch is None:
                continue
            down, up = (self.shape(op.constant) for op in (term.branch.down, term.branch.up))
            inner = self.rank(term.branch)
            if inner * inner >= min(math.prod(down), math.prod(up)):  # not fewer features than it takes and gives
                continue
            for held in (v for v in (node.inputs if node is not None else ()) if v is not None):
                if not self._inputs & {*self._origins(held)}:
                    self._refuse_quantised(held)
            names = [op.constant.name for op in (term.branch.down, term.branch.up)]
            reason = f"{' and '.join(names)} are two narrow linear ops, added to no single linear op of the same input"
            reason += f", here to {what}"
            refuse(f"{self.place}, node {term.add.name or term.add.outputs[0].name}", reason, REMEDY)

    def _refuse_quantised(self, weight: Any) -> None:
        """A sum of a quantised weight and a delta is another weight, in float."""
        for value in self._origins(weight):
            node, held = value.producer(), value.const_value
            coarse = held is not None and len(held.shape) > 1 and held.dtype.name not in _FLOATS
            if coarse or (node is not None and node.op_type == "DequantizeLinear"):
                what = f"{value.name}, {held.dtype.name}" if held is not None else f"{node.op_type} {node.name}"
                reason = f"the weight is quantised ({what}): with a delta in it, it would be stored in float"
                remedy = "fold the float file and quantise that one, or leave the adapter beside the quantised weight"
                refuse(f"{self.place}, {weight.name}", reason, remedy)

    def _shared(self, value: Any) -> bool:
        """More than one node reads its numbers, in a body too, or the graph gives them out."""
        readers = [use.node for use in value.uses() if op_type(use.node) != "Shape"]
        return len(readers) > 1 or value.is_graph_output()


def scope_of(node: Any) -> str:
    """The module that a node is of, as torch's exporters say it: one in its metadata, the other in its name."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) > 1:
        return str(scopes[-2])
    return (node.name or "").strip("/").rpartition("/")[0].replace("/", ".")


def op_type(node: Any) -> str:
    """Of an op of ONNX's own; empty for one of another domain."""
    return "" if node.domain else node.op_type


def _fits(part: Any, whole: Any) -> bool:
    """The one is added to the other element by element, as far as their shapes are known."""
    if part.shape is None or whole.shape is None:
        return True
    pairs = zip(reversed(part.shape), reversed(whole.shape), strict=False)
    return len(part.shape) <= len(whole.shape) and not any(a != b and 1 in (a, b) for a, b in pairs)


def _alike(part: Any, whole: Any) -> bool:
    """Their shapes are known to be one: behind a Reshape rows are rows of the product only then."""
    if part.shape is None or whole.shape is None or len(part.shape) != len(whole.shape):
        return False
    return all(isinstance(a, int) or a.value is not None for a in part.shape) and [*part.shape] == [*whole.shape]


def _biased(node: Any) -> bool:
    return op_type(node) in ("Gemm", "Conv", "ConvTranspose") and len(node.inputs) > 2 and node.inputs[2] is not None


def _keeps(cast: Any) -> bool:
    """It changes no number, but for rounding."""
    from onnx_ir import DataType

    given, to = cast.inputs[0].dtype, DataType(attribute(cast, "to")).name
    return given is not None and any({given.name, to} <= kinds for kinds in (_FLOATS, _WHOLE))
