"""Open forms: a matmul that the table does not know becomes a row of it, after a check on its own examples.

op(x, W + s·B·A)  =  op(x, W) + up(down(x, s·A), B)        in float64, with B ≠ 0 and a weight that is not square
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapted_weight import COMPOSITE, AdaptedWeight, Branch
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import FormError, LoraFxError, essence
from lora_fx.graph.forms import FORMS, Call, Form
from lora_fx.graph.layout import Layout, default, infer
from lora_fx.graph.program import capture
from lora_fx.graph.views import COPIES, MOVES, View

Example = Callable[[Any], torch.Tensor]

_RANK, _ALPHA = 2, 3  # scale 1.5: neither a lost nor a doubled scale, nor a rank taken for it, gives the same
_lock = threading.Lock()


@dataclass(frozen=True)
class Registration:
    """A form in the table. As a context manager it takes the form out at the end."""

    form: Form

    def remove(self) -> None:
        """Take it out. Models that were adapted stay right: their graphs keep the branch, any other use is dense."""
        with _lock:
            for op in [op for op in self.form.ops if FORMS.get(op) is self.form]:
                del FORMS[op]

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    _check_row(form, shape)
    with _lock:
        _refuse_taken(form)
        trial = _Trial(form, tuple(shape))
        FORMS.update(dict.fromkeys(form.ops, replace(form, parse=trial.parse)))
        try:
            trial.judge([fires] if callable(fires) else list(fires), leaves)
        finally:
            for op in form.ops:
                del FORMS[op]
        FORMS.update(dict.fromkeys(form.ops, form))
    return Registration(form)


def _error(form: Form, reason: str, remedy: str) -> FormError:
    return FormError(reason, place=f"form {form.name!r}", remedy=remedy)


def _check_row(form: Form, shape: Sequence[int]) -> None:
    if not isinstance(form, Form):
        raise FormError(f"{form!r} is no Form", place="register_form", remedy="pass a lora_fx.graph.forms.Form")
    if not isinstance(form.name, str) or not form.name.isidentifier():
        raise _error(form, "its name is no identifier", "give a name that a rule can say: form='my_linear'")
    if isinstance(form.ops, str) or not form.ops or not all(isinstance(op, str) and op for op in form.ops):
        raise _error(form, f"ops={form.ops!r} are no names of ops", 'give ops=frozenset({"inner"}) or {"mylib::name"}')
    if len(shape) < 2 or len(set(shape)) != len(shape) or min(shape) < 2:
        raise _error(form, f"shape={tuple(shape)} hides a transposed branch", "give sizes that differ, such as (6, 8)")


def _refuse_taken(form: Form) -> None:
    if form.name in {known.name for known in FORMS.values()}:
        raise _error(form, "a form of that name is registered", "remove that one first, or give another name")
    for op in sorted(form.ops):
        if op in FORMS:
            raise _error(form, f"the op {op!r} belongs to the form {FORMS[op].name!r}", "leave it out of ops")
        if op in MOVES or op in COPIES or op in COMPOSITE:
            raise _error(form, f"lora_fx looks through the op {op!r}: it never reaches a form", "leave it out of ops")


@dataclass(frozen=True)
class _Reading:
    """What `parse` made of a call."""

    op: str
    call: Call | None


@dataclass
class _Trial:
    """A row on trial: in the table it serves this thread alone, and others go on without it."""

    form: Form
    shape: tuple[int, ...]
    only_look: bool = False
    """Note what `parse` says, and compute without it."""
    readings: list[_Reading] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def parse(self, form: Form, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: Any) -> Call | None:
        if threading.get_ident() != self.thread:
            return None
        call = self.form.parse(form, op, args, kwargs, ndim)
        self.readings.append(_Reading(op, call))
        return None if self.only_look else call

    def error(self, reason: str, remedy: str) -> FormError:
        return _error(self.form, reason, remedy)

    def judge(self, fires: list[Example], leaves: Example) -> None:
        seen: set[str] = set()
        layout = default(self.shape)
        for example in fires:
            layout = self._layout(example, seen)
            self._check_branch(example, layout)
            seen |= self._check_capture(example)
        if missing := sorted(self.form.ops - seen):
            raise self.error(f"no example calls {', '.join(missing)}", "give fires a call of each op of the form")
        self._check_left_alone(leaves, layout)

    def _run(self, example: Example, weight: Any) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            try:
                result = example(weight)
            except LoraFxError:
                raise
            except Exception as error:  # theirs: any
                raise self.error(
                    f"an example raises {essence(error)}",
                    "an example is a function of the weight alone, float64 and of this shape; parse, down and up have "
                    "to run on it",
                ) from error
        if not isinstance(result, torch.Tensor) or result.dtype != torch.float64:
            kind = result.dtype if isinstance(result, torch.Tensor) else type(result).__name__
            raise self.error(f"an example returns {kind}", "return the float64 tensor that the op gives")
        return result

    def _weight(self, layout: Layout) -> tuple[AdaptedWeight, Adapter]:
        """A weight of the examples' shape with an adapter of random factors."""
        draw = torch.Generator().manual_seed(0)
        adapter = Adapter(layout, rank=_RANK, alpha=_ALPHA, dtype=torch.float64)
        with torch.no_grad():
            adapter.A.normal_(generator=draw)
            adapter.B.normal_(generator=draw)
        plain = torch.randn(self.shape, dtype=torch.float64, generator=draw)
        branches = (Branch(adapter, adapter.low_rank(), None),)
        return AdaptedWeight(plain, View.of(self.shape), branches, plain), adapter

    def _look(self, example: Example) -> list[_Reading]:
        """What `parse` says of the calls in an example, with a weight that computes densely."""
        self.readings, self.only_look = [], True
        try:
            self._run(example, self._weight(default(self.shape))[0])
        finally:
            self.only_look = False
        return self.readings

    def _layout(self, example: Example, seen: set[str]) -> Layout:
        """The layout that the example's calls give the weight."""
        readings = self._look(example)
        calls = [reading.call for reading in readings if reading.call is not None]
        seen |= {reading.op for reading in readings if reading.call is not None}
        if not calls:
            called = ", ".join(sorted({reading.op for reading in readings})) or f"none of {sorted(self.form.ops)}"
            raise self.error(
                f"an example does not fire: it calls {called}, and parse gives no Call",
                "parse must give a Call for it, and ops name what it calls",
            )
        layouts = [self._fitting(call) for call in calls]
        return layouts[0]

    def _fitting(self, call: Call) -> Layout:
        weight, sides = call.weight, call.sides
        if not isinstance(weight, AdaptedWeight) or isinstance(call.x, AdaptedWeight):
            raise self.error("parse takes x for the weight", "give Call(form, x, weight, sides); ndim(x) is None")
        fits = len(sides) == weight.ndim and set(sides) <= set("bio") and len(call.out_dims) == sides.count("o")
        layout = infer(self.shape, weight.window, sides) if fits else None
        if layout is None:
            raise self.error(
                f"sides={sides!r} with out_dims={call.out_dims} do not fit an operand of shape {tuple(weight.shape)}",
                "give each axis of the weight operand i (summed over with x), o (in the output) or b (a batch), and "
                "each o its dim of the output",
            )
        return layout

    def _check_branch(self, example: Example, layout: Layout) -> None:
        weight, adapter = self._weight(layout)
        out, base = self._run(example, weight), self._run(example, weight.base)
        wanted = self._run(example, weight.base + adapter.delta().detach())
        if out.shape != wanted.shape:
            raise self.error(f"the branch makes {tuple(out.shape)} of {tuple(wanted.shape)}", "up must give op's shape")
        bound = self._bound(base, wanted)
        if not float((wanted - base).abs().max()) > bound:
            raise self.error("an example gives the same for another weight", "give one whose result depends on it")
        error = float((out - wanted).detach().abs().max())
        if not error <= bound:
            raise self.error(
                f"the branch is not the op with s·B·A for its weight: {_how(out - base, wanted - base, bound)}"
                f"off by {error:.1e}, and rounding explains {bound:.1e}",
                "down must give x·Aᵀ and up z·Bᵀ, with all that the op multiplies by besides",
            )
        self._check_gradients(out, out - base, adapter, bound)

    def _bound(self, *results: torch.Tensor) -> float:
        """Two orders of one sum differ by less than its number of terms times one rounding each."""
        terms = 8 * _RANK * torch.Size(self.shape).numel()
        return terms * torch.finfo(torch.float64).eps * max(float(r.abs().max()) for r in results)

    def _check_gradients(self, out: torch.Tensor, branch: torch.Tensor, adapter: Adapter, bound: float) -> None:
        """The branch is linear in A and in B, so ⟨∂/∂A, A⟩ = ⟨∂/∂B, B⟩ = ⟨cotangent, branch⟩."""
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        factors = adapter.A, adapter.B
        try:
            grads = torch.autograd.grad(out, factors, cotangent)
        except RuntimeError as error:
            raise self.error(f"no gradient reaches A or B: {essence(error)}", "mend their backward") from error
        wanted = float((cotangent * branch.detach()).sum())
        found = [float((g * f.detach()).sum()) for g, f in zip(grads, factors, strict=True)]
        if not all(abs(value - wanted) <= bound * float(cotangent.abs().sum()) for value in found):
            raise self.error("the gradients of A and B are not those of the branch", "mend the backward of down or up")

    def _check_capture(self, example: Example) -> set[str]:
        """The ops that a captured graph has for the example: the analysis reads it there."""
        self.readings = []
        program = capture(_Model(example, self._weight(default(self.shape))[0].base), torch.zeros(1))
        (weight,) = program.weights
        if not any(use.call is not None and use.call.form.name == self.form.name for use in weight.uses):
            there = ", ".join(use.form for use in weight.uses) or "none that reads it"
            raise self.error(
                f"in a captured graph the ops of an example are {there}",
                "name those in ops, or make the op one that torch records: torch.library.custom_op",
            )
        return {reading.op for reading in self.readings if reading.call is not None}

    def _check_left_alone(self, leaves: Example, layout: Layout) -> None:
        readings = self._look(leaves)
        if not readings:
            raise self.error(
                "the counter-example shows nothing: it calls none of the ops with the weight",
                "give leaves a call of such an op that is no product of x and the weight",
            )
        if any(reading.call is not None for reading in readings):
            raise self.error("the counter-example fires", "parse must give None for it")
        weight, adapter = self._weight(layout)
        out = self._run(leaves, weight).detach()
        wanted = self._run(leaves, weight.base + adapter.delta().detach())
        if out.shape != wanted.shape or not float((out - wanted).abs().max()) <= self._bound(wanted):
            raise self.error("the counter-example is not the op with W + s·B·A", "parse must read its arguments alone")


class _Model(nn.Module):
    """An example as a model with one weight."""

    def __init__(self, example: Example, weight: torch.Tensor) -> None:
        super().__init__()
        self.example, self.weight = example, nn.Parameter(weight, requires_grad=False)

    def forward(self, unused: torch.Tensor) -> torch.Tensor:
        return self.example(self.weight)


def _how(branch: torch.Tensor, wanted: torch.Tensor, bound: float) -> str:
    """Where it is only the size that is wrong: by how much."""
    branch = branch.detach()
    times = float((branch * wanted).sum() / (wanted * wanted).sum())
    alike = float((branch - times * wanted).abs().max()) <= max(1.0, abs(times)) * bound
    return f"it is {times:.3g} times that, " if alike else ""
