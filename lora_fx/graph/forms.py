"""The forms of a matmul with a weight, one row each: how it is recognised, and its low-rank branch.

    y = contract(x, W)     ⇒     branch = up(down(x, A), B) = contract(x, B·A)

The axes of the weight operand take *sides*: ``i`` is contracted with x, ``o`` reaches the output, ``b`` is a batch
axis that x shares (experts). A row needs three small functions:

* ``parse``: from an op's arguments to a `Call`, or None where the op does not multiply the weight that way;
* ``down``:  z = x contracted with A, of shape (b…, rank, i…) in the order of the operand's own axes;
* ``up``:    the branch from z and B, of shape (b…, o…, rank).

The same rows serve the analysis (ATen ops), the generated graphs (`torch.fx` proxies) and the dispatch (tensors).
The table is open: `lora_fx.register_form` checks a row and puts it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Call:
    """One matmul with a weight, read off an op's arguments."""

    form: Form
    x: Any
    """The operand that is no weight: a tensor, a proxy or a node of a captured graph."""
    weight: Any
    """The operand that is one, or a view of one."""
    sides: str
    """One of ``b``, ``i``, ``o`` for each axis of the weight operand."""
    out_dims: tuple[int, ...] = (-1,)
    """The dims of the op's output that the ``o`` axes became, in order."""
    options: dict[str, Any] = field(default_factory=dict)
    """What `down` and `up` need beside x: strides, offsets, a scale. They find the branch's rank in it too. An index
    that is ``untrained`` looks up a row that gets no gradient."""


@dataclass(frozen=True)
class Form:
    """A row of the table."""

    name: str
    """What rules and plans call it."""
    ops: frozenset[str]
    """As `op_name` gives them: torch's own name (``linear``), or ``library::name`` of an op from elsewhere."""
    parse: Callable[[Form, str, tuple[Any, ...], dict[str, Any], Callable[[Any], int | None]], Call | None]
    """(form, op, args, kwargs, ndim) → the `Call`, or None. ``ndim(operand)`` is the number of axes of a weight, and
    None for what is no weight; nothing else of an operand may be asked: it may be a node of a graph."""
    down: Callable[[Call, Any, Any], Any]
    """(call, x, A) → z."""
    up: Callable[[Call, Any, Any], Any]
    """(call, z, B) → the branch."""
    looks_up: bool = False
    """x holds indices: dropout on the (one-hot) branch input drops whole rows of z, and no pattern means it."""
    by_rows: bool = False
    """Of a matrix the op is alpha·x·Wᵀ, and what does not depend on W: it multiplies each row of x (…, in), whichever
    other rows there are. ``alpha`` is an option of the call, 1 where there is none."""
    role: str = ""
    """What every use in this form does; empty where the dataflow around it tells, as around a linear."""


def op_name(func: Any) -> str:
    """torch's own name of an op: the same for `F.linear`, `Tensor.matmul`, a property and an ATen overload.

    An op of another library keeps its namespace: ``mylib::linear`` is no ``linear``.
    """
    if isinstance(func, str):
        return func
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name.removeprefix("aten::")
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.removeprefix("aten::")
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property of Tensor arrives as the getter of its descriptor
        return getattr(func.__self__, "__name__", "")
    return {"__matmul__": "matmul", "__getitem__": "getitem"}.get(name, name)


def find(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], weight_ndim: Callable[[Any], int | None]
) -> Call | None:
    """The `Call` that an op makes with a weight, or None.

    Args:
        weight_ndim: the number of axes of a weight operand, None for anything that is no weight.
    """
    form = FORMS.get(op_name(func))
    if form is None or kwargs.get("out") is not None:  # a branch cannot be added to what is written elsewhere
        return None
    return form.parse(form, op_name(func), tuple(args), kwargs, weight_ndim)


def _bind(names: str, args: Sequence[Any], kwargs: dict[str, Any], **synonyms: str) -> dict[str, Any]:
    return dict(zip(names.split(), args, strict=False)) | {synonyms.get(k, k): v for k, v in kwargs.items()}


def _parse_linear(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    a = _bind("input weight bias", args, kwargs)
    if ndim(a["weight"]) != 2 or ndim(a["input"]) is not None:
        return None
    return Call(form, a["input"], a["weight"], "oi", options={"bias": a.get("bias")})


def _linear(call: Call, x: Any, factor: Any) -> Any:
    """Down with A, and up with B."""
    return F.linear(x, factor)


def _parse_matmul(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    """With the weight on either side."""
    left, right, *_ = *args, *kwargs.values()
    if op == "__rmatmul__":
        op, left, right = "matmul", right, left
    return _product(form, left, right, ndim, {"op": op})


def _product(form: Form, left: Any, right: Any, ndim: Callable, options: dict[str, Any]) -> Call | None:
    for x, weight, sides, dim in ((left, right, "io", -1), (right, left, "oi", -2)):
        axes = ndim(weight)
        if axes is not None and axes >= 2 and ndim(x) is None:
            return Call(form, x, weight, "b" * (axes - 2) + sides, (dim,), {**options, "right": dim == -1})
    return None


def _matmul(call: Call, x: Any, factor: Any) -> Any:
    """Down with A, and up with B."""
    if not call.options["right"]:
        return torch.matmul(factor, x)
    return F.linear(x, factor) if len(call.sides) == 2 else torch.matmul(x, factor.transpose(-2, -1))


def _parse_addmm(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    """out = beta·input + alpha·(left @ right)"""
    a = _bind("input left right", args, kwargs, mat1="left", batch1="left", mat2="right", batch2="right")
    options = {"op": op, "alpha": a.get("alpha", 1), "beta": a.get("beta", 1), "bias": a["input"]}
    return _product(form, a["left"], a["right"], ndim, options)


def _addmm_up(call: Call, z: Any, B: Any) -> Any:
    alpha = call.options["alpha"]
    return _matmul(call, z if isinstance(alpha, int) and alpha == 1 else z * alpha, B)


def _parse_einsum(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    """Any equation that is a matmul over the weight."""
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    which = [k for k, operand in enumerate(operands) if ndim(operand) is not None]
    if len(operands) != 2 or len(which) != 1:
        return None
    terms, out = _equation(args[0])
    w, x = terms[which[0]], terms[1 - which[0]]
    if "." in w or len(set(w)) != len(w) or len(set(x) - {"."}) != len(x.replace("...", "")):
        return None
    side = {(True, True): "b", (True, False): "i", (False, True): "o", (False, False): "?"}
    sides = "".join(side[label in x, label in out] for label in w)
    if "?" in sides or "i" not in sides:
        return None
    rank = next(c for c in "rRzZyYqQwWvVuU" if c not in w + x + out)
    kept = "".join(c for c in x.replace("...", "") if c in out)
    batch, contracted, free = ("".join(c for c, own in zip(w, sides, strict=True) if own == side) for side in "bio")
    z = ("..." if "..." in x else "") + kept + rank
    options = {"down": f"{x},{batch}{rank}{contracted}->{z}", "up": f"{z},{batch}{free}{rank}->{out}"}
    after = out.replace("...", ".")  # an ellipsis stands for an unknown number of dims: count from the nearer end
    dims = tuple(k - len(after) if "." in after[:k] else k for k in (after.index(c) for c in free))
    return Call(form, operands[1 - which[0]], operands[which[0]], sides, dims, options)


def _equation(equation: str) -> tuple[list[str], str]:
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # numpy's implicit output: the ellipsis, then every label that occurs once, in alphabetical order
        labels = left.replace(",", "").replace(".", "")
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(labels) if labels.count(c) == 1))
    return terms, out


# Convolutions: A carries the kernel, B is pointwise. Transposed ones have W (in, out / groups, k…), and B carries it.
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_SPATIAL = {f"conv{kind}{n}d": n for kind in ("", "_transpose") for n in (1, 2, 3)}


def _parse_conv(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    transposed = form.name == "conv_transpose"
    order = "stride padding output_padding groups dilation" if transposed else "stride padding dilation groups"
    a = _bind(f"input weight bias {order}", args, kwargs)
    n = ndim(a["weight"])
    if n is None or n != _SPATIAL[op] + 2 or ndim(a["input"]) is not None:
        return None
    defaults = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    options = {k: a.get(k, v) for k, v in defaults.items()}
    if transposed:
        return Call(form, a["input"], a["weight"], "i" + "o" * (n - 1), tuple(range(1 - n, 0)), options)
    return Call(form, a["input"], a["weight"], "o" + "i" * (n - 1), (1 - n,), options)


def _conv_down(call: Call, x: Any, A: Any) -> Any:
    o = call.options
    if o["groups"] > 1:  # every group reads its own channels with the same A
        A = A.repeat(o["groups"], *[1] * (len(call.sides) - 1))
    conv = _CONV[len(call.sides) - 3]
    return conv(x, A, None, o["stride"], o["padding"], o["dilation"], o["groups"])


def _pointwise(call: Call, x: Any, matrix: Any) -> Any:
    """A convolution with a kernel of size 1, of (out, in / groups)."""
    spatial = len(call.sides) - 2
    for _ in range(spatial):
        matrix = matrix.unsqueeze(-1)
    return _CONV[spatial - 1](x, matrix, None, groups=call.options["groups"])


def _conv_transpose_down(call: Call, x: Any, A: Any) -> Any:
    groups = call.options["groups"]
    if groups > 1:  # (r, in) → (groups·r, in / groups)
        A = A.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return _pointwise(call, x, A)


def _conv_transpose_up(call: Call, z: Any, B: Any) -> Any:
    o, n = call.options, len(call.sides)
    B = B.permute(n - 1, *range(n - 1))  # (out / groups, k…, r) → (r, out / groups, k…)
    if o["groups"] > 1:
        B = B.repeat(o["groups"], *[1] * (n - 1))
    conv = _CONV_TRANSPOSE[n - 3]
    return conv(z, B, None, o["stride"], o["padding"], o["output_padding"], o["groups"], o["dilation"])


def _parse_embedding(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    """A row of W for each index. W: (num, dim)"""
    weight_first = bool(args) and ndim(args[0]) is not None  # ATen's order is (weight, indices, …)
    names = "weight input padding_idx" if weight_first else "input weight padding_idx max_norm"
    a = _bind(names, args, kwargs, indices="input")
    padding = a.get("padding_idx")
    if padding is not None and padding < 0:  # none, to ATen; counted from the end, in `F.embedding`
        if not weight_first:
            return None
        padding = None
    if ndim(a["weight"]) != 2 or ndim(a["input"]) is not None or a.get("max_norm") is not None:
        return None
    return Call(form, a["input"], a["weight"], "io", options={"untrained": padding})


def without_gradient(out: Any, indices: Any, index: int) -> Any:
    """`out` as it is; where `indices` are this index no gradient goes through it: its row of W gets none either."""
    if isinstance(out, fx.Proxy):
        return out.tracer.create_proxy("call_function", without_gradient, (out, indices, index), {})
    if not torch.is_grad_enabled():
        return out
    return torch.where((indices == index).unsqueeze(-1), out.detach(), out)


_GROUPED_FALLBACK = "transformers::grouped_mm_fallback"


def _parse_grouped_mm(form: Form, op: str, args: tuple, kwargs: dict, ndim: Callable) -> Call | None:
    """One matmul an expert, rows grouped by `offs`. W: (experts, in, out)"""
    synonyms = {"input": "x", "mat_a": "x", "self": "x", "mat_b": "weight", "mat2": "weight"}
    a = _bind("x weight offs bias", args, kwargs, **synonyms)
    if ndim(a.get("weight")) != 3 or ndim(a["x"]) is not None or a.get("offs") is None:
        return None
    return Call(form, a["x"], a["weight"], "bio", (-1,), {"offs": a["offs"], "fallback": op == _GROUPED_FALLBACK})


def _grouped(call: Call, x: Any, weight: Any) -> Any:
    if call.options["fallback"]:
        return torch.ops.transformers.grouped_mm_fallback(x, weight, call.options["offs"])
    return F.grouped_mm(x, weight, offs=call.options["offs"])


# The kernel reads rows of 16 bytes: the rank is padded with zeros to a multiple of 8, which serves every dtype.
def _grouped_mm_down(call: Call, x: Any, A: Any) -> Any:
    return _grouped(call, x, F.pad(A, (0, 0, 0, -call.options["rank"] % 8)).transpose(-2, -1))


def _grouped_mm_up(call: Call, z: Any, B: Any) -> Any:
    return _grouped(call, z, F.pad(B, (0, -call.options["rank"] % 8)).transpose(-2, -1))


TABLE = (
    Form("linear", frozenset({"linear"}), _parse_linear, _linear, _linear, by_rows=True),
    Form("matmul", frozenset({"matmul", "mm", "bmm", "__rmatmul__"}), _parse_matmul, _matmul, _matmul, by_rows=True),
    Form("addmm", frozenset({"addmm", "baddbmm"}), _parse_addmm, _matmul, _addmm_up, by_rows=True),
    Form("einsum", frozenset({"einsum"}), _parse_einsum,
         down=lambda call, x, A: torch.einsum(call.options["down"], x, A),
         up=lambda call, z, B: torch.einsum(call.options["up"], z, B)),
    Form("conv", frozenset({"conv1d", "conv2d", "conv3d"}), _parse_conv, _conv_down, _pointwise, role="conv"),
    Form("conv_transpose", frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}),
         _parse_conv, _conv_transpose_down, _conv_transpose_up, role="conv"),
    Form("embedding", frozenset({"embedding"}), _parse_embedding, lambda call, x, A: F.embedding(x, A.t()), _linear,
         looks_up=True, role="embedding"),
    Form("grouped_mm", frozenset({"grouped_mm", "_grouped_mm", _GROUPED_FALLBACK}),
         _parse_grouped_mm, _grouped_mm_down, _grouped_mm_up),
)  # fmt: skip

#: op → its form; read whenever a form is asked for, since rows come and go (`lora_fx.deltas.registration`)
FORMS = {op: form for form in TABLE for op in form.ops}

#: ops that multiply with a weight inside, where no branch can be put: they get the dense W + s·B·A
DENSE_OPS = frozenset({
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "bilinear", "embedding_bag", "tensordot", "mv", "inner", "addmv", "addbmm", "chain_matmul", "linalg_multi_dot",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "multi_head_attention_forward",
    "conv_tbc", "convolution", "matmul", "mm", "bmm", "einsum", "linear", "addmm", "baddbmm", "embedding",
})  # fmt: skip
