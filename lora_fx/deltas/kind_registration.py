"""Open kinds: what an adapter can be besides becomes a row of the table, after a trial.

δ(W, θ₀) = 0        δ in float64 = δ in float32, up to rounding        a gradient reaches every tensor of θ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.deltas.adapted_weight import AdaptedWeight, Branch
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import KINDS, REQUIRED, REWRITES, Kind
from lora_fx.deltas.registration import Registration
from lora_fx.errors import KindError, LoraFxError, essence
from lora_fx.graph.layout import Layout
from lora_fx.graph.views import View

_ALIKE = 2.0**6  # roundings that two dtypes may differ by: a few for each of the terms of a small trial
_STEP = 2.0**-20  # by how much of itself θ is moved, to see that δ follows smoothly
_BIASES = (Layout("o", (5,)),)
_WEIGHTS = Layout("oi", (5, 4)), Layout("io", (4, 5)), Layout("boi", (3, 5, 4))


def register_kind(kind: Kind, **settings: Any) -> Registration:
    """Teach lora_fx what an adapter can be, so that rules, plans, folds, checks, files and ONNX know it.

    A kind says which tensors θ has, how they start, and what it adds to a weight, over the canonical axes
    W: (batch…, out, in). Here a scale for each output feature, which starts at 1:

    >>> from lora_fx import Kind, register_kind
    >>> gain = Kind(
    ...     "gain",
    ...     shapes=lambda space: {"gain": (*space.batch, space.out, 1)},
    ...     start=lambda theta, weight: theta.gain.fill_(1),
    ...     delta=lambda weight, theta: (theta.gain - 1) * weight,
    ... )
    >>> known = register_kind(gain)
    >>> known.remove()

    Args:
        kind: its name must be new.
        settings: values for the trial, where the kind has required settings of its own; ``rank=2`` and ``alpha=3`` are
            there.

    Returns:
        The `Registration`: call its `remove`, or use it in a ``with`` statement, to take the kind out again.

    Raises:
        KindError: the row is malformed, δ(W, θ₀) is not 0, or another part of the trial fails. The table is as it was.
    """
    if not isinstance(kind, Kind):
        raise KindError(f"{kind!r} is no Kind", place="register_kind", remedy="pass a lora_fx.Kind")
    trial = _Trial(kind, {**{name: v for name, v in (("rank", 2), ("alpha", 3)) if name in kind.settings}, **settings})
    trial.refuse_malformed()
    for layout in _BIASES if kind.adapts == "bias" else _WEIGHTS:
        for rows in (None, (1, 2), (0, 3)):
            trial.judge(layout, rows)
    KINDS[kind.name] = kind
    return Registration(kind, KINDS)


@dataclass(frozen=True)
class _Trial:
    kind: Kind
    settings: Mapping[str, Any]

    def require(self, holds: bool, reason: str, remedy: str) -> None:
        if not holds:
            raise KindError(reason, place=f"kind {self.kind.name!r}", remedy=remedy)

    def refuse_malformed(self) -> None:
        kind = self.kind
        named = isinstance(kind.name, str) and kind.name.isidentifier()
        self.require(named, "its name is no identifier", "give a name that a rule can say: kind='loha'")
        free = kind.name not in (*KINDS, *REWRITES)
        self.require(free, "a kind of that name is registered", "remove that one, or give another name")
        one = (kind.delta is None) != (kind.factors is None)
        self.require(one, "it has both delta and factors, or neither", "give δ, or its two factors where it has some")
        self.require(kind.adapts in ("weight", "bias"), f"adapts={kind.adapts!r} is unknown", "say 'weight' or 'bias'")
        self.require(
            kind.factors is None or kind.adapts == "weight", "a bias has no factors", "give δ of a kind for biases"
        )
        self.require(
            kind.branch is None or kind.factors is None,
            "it has factors and a branch of its own",
            "leave the branch out: a low-rank one follows from the factors",
        )
        rank = kind.factors is None or kind.settings.get("rank", None) is REQUIRED
        self.require(rank, "it has factors and no required setting rank", 'give settings={"rank": REQUIRED, …}')

    def judge(self, layout: Layout, rows: tuple[int, ...] | None) -> None:
        """One weight, whole or in part."""
        wide = self._adapter(layout, rows, torch.float64)
        weight = torch.randn(layout.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float64, torch.float32):
            self._check_start(self._adapter(layout, rows, dtype), weight.to(dtype))
        self._run(lambda: wide.start(weight))
        self._move(wide, weight)
        kept = weight.clone(), {name: p.detach().clone() for name, p in wide.named_parameters()}
        own = self._delta(wide, weight)
        same = torch.equal(weight, kept[0]) and all(torch.equal(p, kept[1][n]) for n, p in wide.named_parameters())
        self.require(same, "δ writes into W or θ", "compute it without in-place operations on them")
        self.require(
            torch.equal(own, self._delta(wide, weight, seed=1)), "δ is another one each time", "draw nothing in it"
        )
        self.require(float(own.detach().abs().max()) > 0, "δ is 0 whatever θ is", "make it depend on θ")
        self._check_wide(wide, weight, own)
        self._check_narrow(wide, weight, own)
        self._check_gradients(wide, own)
        if self.kind.pads:
            self._check_padding(wide, weight)
        if self.kind.branch is not None and "b" not in layout.sides:
            self._check_branch(wide, weight)

    def _adapter(self, layout: Layout, rows: tuple[int, ...] | None, dtype: torch.dtype) -> Adapter:
        adapter: Adapter = self._run(lambda: Adapter(layout, kind=self.kind, rows=rows, dtype=dtype, **self.settings))
        taken = [name for name in adapter._parameters if hasattr(Adapter, name) or not name.isidentifier()]
        self.require(not taken, f"a tensor of θ cannot be called {', '.join(taken)}", "give it another name")
        self.require(bool(adapter._parameters), "shapes names no tensor", "give the tensors of θ with their shapes")
        return adapter

    def _run(self, what: Any, seed: int = 0) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return what()
            except LoraFxError:
                raise
            except Exception as error:  # theirs: any
                remedy = "shapes, start and δ get W as (batch…, out, in), a bias as (out, 1)"
                self.require(False, f"it raises {essence(error)}", remedy)

    def _delta(self, adapter: Adapter, weight: torch.Tensor, seed: int = 0) -> torch.Tensor:
        matrix, space, factors, delta = adapter.matrix(weight), adapter.space, self.kind.factors, self.kind.delta
        if factors is not None:
            A, B = self._run(lambda: factors(adapter.theta))
            self._check_tensor("A", A, (*space.batch, self.kind.width * space.rank, space.inner), matrix.dtype)
            self._check_tensor("B", B, (*space.batch, space.out, self.kind.width * space.rank), matrix.dtype)
        if delta is not None:
            own = self._run(lambda: delta(matrix, adapter.theta))
            self._check_tensor("δ", own, tuple(matrix.shape), matrix.dtype)
        return self._run(lambda: adapter.delta(weight), seed)

    def _check_tensor(self, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        fits = got == shape
        if name == "δ" and isinstance(value, torch.Tensor) and value.ndim == len(shape):  # one for all inputs will do
            fits = all(n in (1, wanted) for n, wanted in zip(value.shape, shape, strict=True))
        self.require(fits, f"{name} is {got}, and not {shape}", "W comes as (batch…, out, in): give it those axes")
        self.require(value.dtype == dtype, f"{name} is {value.dtype} for {dtype}", "keep to the dtype of θ")
        self.require(bool(value.isfinite().all()), f"{name} is not finite", "mend it")

    def _check_start(self, adapter: Adapter, weight: torch.Tensor) -> None:
        self._run(lambda: adapter.start(weight))
        own = self._delta(adapter, weight)
        reason = f"δ(W, θ₀) is not 0 in {weight.dtype}: its largest element is {float(own.detach().abs().max()):.3g}"
        remedy = "start θ where δ is 0 to the bit: a freshly adapted model is the base"
        self.require(not bool(own.any()), reason, remedy)

    def _move(self, adapter: Adapter, weight: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                size = float(parameter.abs().max()) or 1.0
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator), alpha=size / 2)

    def _check_narrow(self, wide: Adapter, weight: torch.Tensor, own: torch.Tensor) -> None:
        """On numbers that both dtypes have."""
        narrow = self._adapter(wide.layout, wide.rows, torch.float32)
        with torch.no_grad():
            for name, parameter in narrow.named_parameters():
                parameter.copy_(wide.get_parameter(name))
                wide.get_parameter(name).copy_(parameter)
        short = weight.float()
        exact, found = self._delta(wide, short.double()), self._delta(narrow, short)
        off, most = float((found - exact).detach().abs().max()), float(exact.detach().abs().max() + weight.abs().max())
        bound = _ALIKE * torch.finfo(torch.float32).eps * most
        self.require(
            off <= bound,
            f"δ in float32 is off by {off:.1e} from δ in float64, and rounding explains {bound:.1e}",
            "compute δ with torch's functions in the dtype that W and θ have",
        )

    def _check_wide(self, adapter: Adapter, weight: torch.Tensor, own: torch.Tensor) -> None:
        """δ(θ + h) − 2·δ(θ) + δ(θ − h) is of the order of h² where nothing is rounded to less on the way."""
        before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        total = -2 * own.detach()
        with torch.no_grad():
            for h in (_STEP, -_STEP):
                for name, parameter in adapter.named_parameters():
                    parameter.copy_(before[name] * (1 + h))
                total += self._delta(adapter, weight)
            for name, parameter in adapter.named_parameters():
                parameter.copy_(before[name])
        off, size = float(total.abs().max()), float(own.detach().abs().max() + weight.abs().max())
        bound = 2**12 * _STEP**2 * size
        self.require(
            off <= bound,
            f"δ in float64 moves in steps of {off:.1e}: something in it rounds to a narrower dtype",
            "compute δ with torch's functions in the dtype that W and θ have",
        )

    def _check_gradients(self, adapter: Adapter, own: torch.Tensor) -> None:
        own = self._delta(adapter, torch.randn(own.shape, dtype=own.dtype, generator=torch.Generator().manual_seed(2)))
        cotangent = torch.randn(own.shape, dtype=own.dtype, generator=torch.Generator().manual_seed(3))
        trained = ((name, p) for name, p in adapter.named_parameters() if name not in self.kind.frozen)
        names, tensors = zip(*trained, strict=True)
        reached = own.requires_grad
        grads = torch.autograd.grad(own, tensors, cotangent, allow_unused=True) if reached else [None] * len(names)
        missed = [name for name, g in zip(names, grads, strict=True) if g is None or not bool(g.any())]
        self.require(not missed, f"no gradient reaches {', '.join(missed)}", "compute δ from it, differentiably")

    def _check_padding(self, adapter: Adapter, weight: torch.Tensor) -> None:
        """One rank more, of zeros, adds nothing."""
        self.require("rank" in self.kind.settings, "it pads, and has no setting rank", "leave pads out")
        wider = Adapter(
            adapter.layout, kind=self.kind, rows=adapter.rows, dtype=torch.float64, room=adapter.rank + 1,
            **self.settings,
        )  # fmt: skip
        wider.put({name: p.detach() for name, p in adapter.named_parameters()})
        own, found = (self._run(lambda a=a: a.delta(weight)).detach() for a in (adapter, wider))
        off, bound = float((found - own).abs().max()), _ALIKE * torch.finfo(torch.float64).eps * float(own.abs().max())
        reason = f"it pads, and one more rank of zeros moves δ by {off:.1e}; rounding explains {bound:.1e}"
        self.require(off <= bound, reason, "leave pads out: then no adapter of another rank can replace one of it")

    def _check_branch(self, adapter: Adapter, weight: torch.Tensor) -> None:
        """Beside a linear: what it computes, and its gradients, are those of the op on W + δ."""
        draw = torch.Generator().manual_seed(4)
        plain = adapter.layout.to_matrix(weight)
        x = torch.randn(6, plain.shape[-1], dtype=torch.float64, generator=draw, requires_grad=True)
        bias = torch.randn(plain.shape[-2], dtype=torch.float64, generator=draw)
        adapted = AdaptedWeight(weight, View.of(weight.shape), [Branch(adapter, adapter.value(), None)], weight)
        whole = weight + adapter.delta(weight)
        turned = adapter.layout.sides == "io"
        found = self._run(lambda: F.linear(x, adapted.t() if turned else adapted, bias))  # type: ignore[arg-type, attr-defined]
        wanted = F.linear(x, whole.t() if turned else whole, bias)
        inputs = (x, *(p for name, p in adapter.named_parameters() if name not in self.kind.frozen))
        cotangent = torch.randn(wanted.shape, dtype=torch.float64, generator=draw)
        pairs = [(found, wanted)]
        grads = [torch.autograd.grad(y, inputs, cotangent, allow_unused=True) for y in (found, wanted)]
        pairs += [(a, b) for a, b in zip(*grads, strict=True) if a is not None and b is not None]
        off = max(float((a - b).detach().abs().max()) / (1 + float(b.detach().abs().max())) for a, b in pairs)
        bound = _ALIKE * torch.finfo(torch.float64).eps
        self.require(
            off <= bound and len(pairs) == 1 + len(inputs),
            f"its branch, or a gradient of it, is off by {off:.1e} from the op on W + δ; rounding explains {bound:.1e}",
            "the branch gives x·δᵀ alone, from product.base, product.low_rank and product.features",
        )
