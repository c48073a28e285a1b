"""Open forms: a matmul that the table does not know becomes a row of it, after a check on its own examples.

op(x, W + s·B·A)  =  op(x, W) + up(down(x, s·A), B)        in float64, with B ≠ 0 and a weight that is not square
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapted_weight import COMPOSITE, AdaptedWeight, Branch
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import FormError, essence
from lora_fx.graph.forms import FORMS, Call, Form
from lora_fx.graph.layout import Layout, default, infer
from lora_fx.graph.program import capture
from lora_fx.graph.views import COPIES, MOVES, View

Example = Callable[[Any], torch.Tensor]

_RANK, _ALPHA = 2, 3  # scale 1.5: neither a lost nor a doubled scale, nor a rank taken for it, gives the same
_lock = threading.Lock()


@dataclass(frozen=True)
class Registration(AbstractContextManager):
    """A row in a table: a form, or a kind. As a context manager it takes the row out at the end."""

    row: Any
    table: dict[str, Any]

    def remove(self) -> None:
        """Take it out. Models that were adapted stay right: what has a branch or an adapter of it keeps that."""
        with _lock:
            for key in [key for key, row in self.table.items() if row is self.row]:
                del self.table[key]

    def __exit__(self, *raised: object) -> None:
        self.remove()


def register_form(
    form: Form, *, shape: Sequence[int], fires: Example | Sequence[Example], leaves: Example
) -> Registration:
    """Teach lora_fx how an op multiplies with a weight, so that plans, patterns, branches, checks and files know it.

    A form reads the op's arguments (`parse`) and gives the low-rank product in two steps, x with A and then with B.
    Here for ``torch.inner(x, W) = x·Wᵀ``, which otherwise gets the dense W + s·B·A:

    >>> import torch
    >>> from lora_fx.graph.forms import Call, Form
    >>> def parse(form, op, args, kwargs, ndim):
    ...     x, W = args
    ...     if ndim(W) != 2 or ndim(x) is not None:  # ndim is None for what is no weight
    ...         return None
    ...     return Call(form, x, W, sides="oi")  # W's axes: out, and in, which is summed over with x
    >>> inner = Form(
    ...     "inner",
    ...     ops=frozenset({"inner"}),
    ...     parse=parse,
    ...     down=lambda call, x, A: x @ A.mT,  # A: (rank, in)
    ...     up=lambda call, z, B: z @ B.mT,  # B: (out, rank)
    ... )
    >>> x = torch.randn(5, 8, dtype=torch.float64)
    >>> known = register_form(
    ...     inner, shape=(6, 8), fires=lambda W: torch.inner(x, W), leaves=lambda W: torch.inner(W, x)
    ... )
    >>> known.remove()

    Args:
        form: its name and ops must be new; an op of a library of your own is ``"library::name"``.
        shape: of the examples' weight: no two sizes alike, none of them 1.
        fires: a call, or several, that multiply with a weight of this shape in this form; together they use every op
            of the form. The weight is float64, and so must x be.
        leaves: a call of one of the ops with the weight that is no such product: `parse` must give None.

    Returns:
        The `Registration`: call its `remove`, or use it in a ``with`` statement, to take the form out again.

    Raises:
        FormError: the row or one of its examples is wrong. The table is what it was.
    """
    if not isinstance(form, Form):
        raise FormError(f"{form!r} is no Form", place="register_form", remedy="pass a lora_fx.graph.forms.Form")
    trial = _Trial(form, tuple(shape))
    trial.refuse_malformed()
    with _lock:
        trial.refuse_taken()
        FORMS.update(dict.fromkeys(form.ops, replace(form, parse=trial.parse)))
        try:
            trial.judge([fires] if callable(fires) else list(fires), leaves)
        finally:
            for op in form.ops:
                del FORMS[op]
        FORMS.update(dict.fromkeys(form.ops, form))
    return Registration(form, FORMS)


@dataclass
class _Trial:
    """A row on trial: in the table it serves this thread alone, and others go on without it."""

    form: Form
    shape: tuple[int, ...]
    only_look: bool = False  # note what `parse` says, and compute without it
    asked: set[str] = field(default_factory=set)  # the ops that the last example calls with its weight
    calls: list[Call] = field(default_factory=list)  # what `parse` made of them
    fired: set[str] = field(default_factory=set)  # the ops of the form that some example uses
    layout: Layout = field(init=False)  # of the weight, as the examples so far multiply with it
    thread: int = field(default_factory=threading.get_ident)

    def parse(self, form: Form, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: Any) -> Call | None:
        if threading.get_ident() != self.thread:
            return None
        call = self.form.parse(form, op, args, kwargs, ndim)
        self.asked.add(op)
        if call is not None:
            self.calls.append(call)
            self.fired.add(op)
        return None if self.only_look else call

    def require(self, holds: bool, reason: str, remedy: str) -> None:
        if not holds:
            raise self.error(reason, remedy)

    def error(self, reason: str, remedy: str) -> FormError:
        return FormError(reason, place=f"form {self.form.name!r}", remedy=remedy)

    def refuse_malformed(self) -> None:
        name, ops, shape = self.form.name, self.form.ops, self.shape
        named = isinstance(name, str) and name.isidentifier()
        self.require(named, "its name is no identifier", "give a name that a rule can say: form='my_linear'")
        listed = bool(ops) and not isinstance(ops, str) and all(isinstance(op, str) and op for op in ops)
        self.require(listed, f"ops={ops!r} are no names of ops", 'give ops=frozenset({"inner"}) or {"mylib::name"}')
        tells = len(shape) >= 2 and len(set(shape)) == len(shape) and min(shape) >= 2
        self.require(tells, f"shape={shape} hides a transposed branch", "give sizes that differ, such as (6, 8)")

    def refuse_taken(self) -> None:
        free = self.form.name not in {known.name for known in FORMS.values()}
        self.require(free, "a form of that name is registered", "remove that one first, or give another name")
        for op in sorted(self.form.ops):
            owner = f"belongs to the form {FORMS[op].name!r}" if op in FORMS else ""
            self.require(not owner, f"the op {op!r} {owner}", "leave it out of ops")
            seen_through = op in MOVES or op in COPIES or op in COMPOSITE
            reason = f"lora_fx looks through the op {op!r}: it never reaches a form"
            self.require(not seen_through, reason, "leave it out of ops")

    def judge(self, fires: list[Example], leaves: Example) -> None:
        self.layout = default(self.shape)
        for example in fires:
            self._check_sides(example)
            self._check_branch(example)
            self._check_capture(example)
        missing = ", ".join(sorted(self.form.ops - self.fired))
        self.require(not missing, f"no example calls {missing}", "give fires a call of each op of the form")
        self._check_left_alone(leaves)

    def _run(self, example: Example, weight: Any) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            try:
                result = example(weight)
            except Exception as error:  # theirs: any
                remedy = "it takes the weight alone, float64 and of this shape; parse, down and up have to run on it"
                raise self.error(f"an example raises {essence(error)}", remedy) from error
        kind = getattr(result, "dtype", type(result).__name__)
        self.require(kind == torch.float64, f"an example returns {kind}", "return the float64 tensor that the op gives")
        return result

    def _weight(self) -> AdaptedWeight:
        """A weight of the examples' shape with an adapter of random factors."""
        draw = torch.Generator().manual_seed(0)
        adapter = Adapter(self.layout, rank=_RANK, alpha=_ALPHA, dtype=torch.float64)
        for factor in (adapter.A, adapter.B):
            nn.init.normal_(factor, generator=draw)
        plain = torch.randn(self.shape, dtype=torch.float64, generator=draw)
        return AdaptedWeight(plain, View.of(self.shape), [Branch(adapter, adapter.value(), None)], plain)

    def _look(self, example: Example) -> None:
        """Note what `parse` says of the calls in an example, with a weight that computes densely."""
        self.asked, self.calls, self.only_look = set(), [], True
        try:
            self._run(example, self._weight())
        finally:
            self.only_look = False

    def _check_sides(self, example: Example) -> None:
        """The example fires, and its calls give the weight a layout."""
        self._look(example)
        called = ", ".join(sorted(self.asked)) or f"none of {sorted(self.form.ops)}"
        reason = f"an example does not fire: it calls {called}, and parse gives no Call"
        self.require(bool(self.calls), reason, "parse must give a Call for it, and ops name what it calls")
        layouts = [self._fitting(call) for call in self.calls]
        self.layout = layouts[0]

    def _fitting(self, call: Call) -> Layout:
        weight, sides = call.weight, call.sides
        taken = isinstance(weight, AdaptedWeight) and not isinstance(call.x, AdaptedWeight)
        self.require(taken, "parse takes x for the weight", "give Call(form, x, weight, sides); ndim(x) is None")
        fits = len(sides) == weight.ndim and set(sides) <= set("bio") and len(call.out_dims) == sides.count("o")
        if not fits or (layout := infer(self.shape, weight.window, sides)) is None:
            shape = tuple(weight.shape)
            raise self.error(
                f"sides={sides!r} with out_dims={call.out_dims} do not fit an operand of shape {shape}",
                "give each axis i (summed over with x), o (in the output, with its dim there) or b (a batch)",
            )
        return layout

    def _check_branch(self, example: Example) -> None:
        weight = self._weight()
        out, base = self._run(example, weight), self._run(example, weight.base)
        wanted = self._run(example, weight.dense().detach())
        shapes = f"the branch makes {tuple(out.shape)} of {tuple(wanted.shape)}"
        self.require(out.shape == wanted.shape, shapes, "up must give op's shape")
        branch, bound, off = out - base, self._bound(base, wanted), _largest(out - wanted)
        tells = _largest(wanted - base) > bound
        self.require(tells, "an example gives the same for another weight", "give one whose result depends on it")
        self.require(
            off <= bound,
            f"the branch is not the op with s·B·A for its weight: {_how(branch.detach(), wanted - base, bound)}"
            f"off by {off:.1e}, and rounding explains {bound:.1e}",
            "down must give x·Aᵀ and up z·Bᵀ, with all that the op multiplies by besides",
        )
        self._check_gradients(out, branch.detach(), weight.branches[0].adapter, bound)

    def _bound(self, *results: torch.Tensor) -> float:
        """Two orders of one sum differ by less than its number of terms times one rounding each."""
        terms = 8 * _RANK * torch.Size(self.shape).numel()
        return terms * torch.finfo(torch.float64).eps * max(map(_largest, results))

    def _check_gradients(self, out: torch.Tensor, branch: torch.Tensor, adapter: Adapter, bound: float) -> None:
        """The branch is linear in A and in B, so ⟨∂/∂A, A⟩ = ⟨∂/∂B, B⟩ = ⟨cotangent, branch⟩."""
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        factors = adapter.A, adapter.B
        try:
            grads = torch.autograd.grad(out, factors, cotangent)
        except RuntimeError as error:
            raise self.error(f"no gradient reaches A or B: {essence(error)}", "mend their backward") from error
        found = torch.stack([(g * f.detach()).sum() for g, f in zip(grads, factors, strict=True)])
        alike = _largest(found - (cotangent * branch).sum()) <= bound * float(cotangent.abs().sum())
        self.require(alike, "the gradients of A and B are not those of the branch", "mend the backward of down or up")

    def _check_capture(self, example: Example) -> None:
        """A captured graph has an op of the form for the example: the analysis reads it there."""
        model = nn.Module()
        model.weight = nn.Parameter(self._weight().base, requires_grad=False)
        model.forward = lambda unused: example(model.weight)
        (weight,) = capture(model, torch.zeros(1)).weights
        there = ", ".join(use.form for use in weight.uses) or "none that reads it"
        self.require(
            any(use.call is not None and use.form == self.form.name for use in weight.uses),
            f"in a captured graph the ops of an example are {there}",
            "name those in ops, or make the op one that torch records: torch.library.custom_op",
        )

    def _check_left_alone(self, leaves: Example) -> None:
        self._look(leaves)
        reason = "the counter-example shows nothing: it calls none of the ops with the weight"
        self.require(
            bool(self.asked), reason, "give leaves a call of such an op that is no product of x and the weight"
        )
        self.require(not self.calls, "the counter-example fires", "parse must give None for it")
        weight = self._weight()
        out, wanted = self._run(leaves, weight), self._run(leaves, weight.dense().detach())
        same = out.shape == wanted.shape and _largest(out - wanted) <= self._bound(wanted)
        self.require(same, "the counter-example is not the op with W + s·B·A", "parse must read its arguments alone")


def _largest(values: torch.Tensor) -> float:
    return float(values.detach().abs().max())


def _how(branch: torch.Tensor, wanted: torch.Tensor, bound: float) -> str:
    """Where it is only the size that is wrong: by how much."""
    times = float((branch * wanted).sum() / (wanted * wanted).sum())
    alike = _largest(branch - times * wanted) <= max(1.0, abs(times)) * bound
    return f"it is {times:.3g} times that, " if alike else ""
