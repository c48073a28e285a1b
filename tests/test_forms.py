"""Each form of the table: the branch is the op on the delta alone, and what must not fire does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.graph import forms
from lora_fx.graph.layout import Layout, infer, place
from lora_fx.graph.views import View, move

W = object()  # stands for the weight among an op's arguments
RANK = 3


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 6


#: id: (weight's layout, movement ops on it, op, its arguments)
FIRES = {
    "linear": (Layout("oi", (6, 8)), [], F.linear, (draw(2, 5, 8), W)),
    "linear-of-transpose": (Layout("io", (8, 6)), [("t", ())], F.linear, (draw(2, 5, 8), W)),
    "linear-third-chunk": (Layout("oi", (18, 8)), [("chunk", (3, 0), 2)], F.linear, (draw(2, 8), W)),
    "linear-slice-of-in": (Layout("oi", (6, 8)), [("narrow", (1, 2, 5))], F.linear, (draw(2, 5), W)),
    "linear-every-other-row": (
        Layout("oi", (6, 8)),
        [("__getitem__", (slice(1, None, 2),))],
        F.linear,
        (draw(2, 8), W),
    ),
    "one-expert": (Layout("boi", (3, 4, 8)), [("select", (0, 1))], F.linear, (draw(5, 8), W)),
    "matmul-right": (Layout("io", (8, 6)), [], torch.matmul, (draw(2, 5, 8), W)),
    "matmul-left": (Layout("oi", (6, 8)), [], torch.matmul, (W, draw(2, 8, 5))),
    "matmul-left-of-vector": (Layout("oi", (6, 8)), [], torch.matmul, (W, draw(8))),
    "matmul-out-of-one": (Layout("io", (8, 1)), [], torch.matmul, (draw(2, 8), W)),
    "bmm": (Layout("bio", (3, 8, 4)), [], torch.bmm, (draw(3, 5, 8), W)),
    "bmm-left": (Layout("boi", (3, 4, 8)), [], torch.bmm, (W, draw(3, 8, 5))),
    "bmm-expanded": (Layout("io", (8, 6)), [("expand", (2, 8, 6))], torch.bmm, (draw(2, 5, 8), W)),
    "matmul-batched": (Layout("boi", (3, 4, 8)), [("transpose", (1, 2))], torch.matmul, (draw(2, 3, 5, 8), W)),
    "einsum-heads": (Layout("ioo", (8, 3, 4)), [], torch.einsum, ("btd,dhe->bthe", draw(2, 5, 8), W)),
    "einsum-out": (Layout("iio", (3, 4, 8)), [], torch.einsum, ("bthe,hed->btd", draw(2, 5, 3, 4), W)),
    "einsum-mixed-axes": (Layout("oio", (3, 8, 4)), [], torch.einsum, ("btd,hde->bhte", draw(2, 5, 8), W)),
    "einsum-ellipsis": (Layout("oi", (6, 8)), [], torch.einsum, ("...d,od->...o", draw(2, 5, 8), W)),
    "einsum-weight-first": (Layout("oi", (6, 8)), [], torch.einsum, ("od,bd->bo", W, draw(2, 8))),
    "einsum-implicit": (Layout("io", (8, 6)), [], torch.einsum, ("bd,do", draw(2, 8), W)),
    "einsum-experts": (Layout("bio", (3, 8, 4)), [], torch.einsum, ("ebd,edo->ebo", draw(3, 2, 8), W)),
    "einsum-interleaved": (
        Layout("oi", (18, 8)),
        [("view", (2, 3, 3, 8)), ("select", (1, 2)), ("permute", ((2, 0, 1),))],
        torch.einsum,
        ("bti,ihd->bthd", draw(2, 5, 8), W),
    ),
    "embedding": (Layout("io", (6, 8)), [], F.embedding, (ids(2, 4), W)),
    "tied-head": (Layout("io", (6, 8)), [], F.linear, (draw(2, 8), W)),
    "tied-embedding": (Layout("oi", (6, 8)), [], F.embedding, (ids(2, 4), W)),
}
for groups in (1, 2):
    for n, conv in enumerate((F.conv1d, F.conv2d, F.conv3d), 1):
        kernel, x = (3, 2, 2)[:n], draw(2, 4, *[7] * n)
        layout = Layout("o" + "i" * (n + 1), (6, 4 // groups, *kernel))
        FIRES[f"conv{n}d-groups{groups}"] = layout, [], conv, (x, W, None, 2, 1, 2, groups)
    FIRES[f"conv1d-same-groups{groups}"] = Layout("oii", (6, 4 // groups, 3)), [], F.conv1d, (
        draw(2, 4, 9), W, None, 1, "same", 2, groups)  # fmt: skip
    for n, conv in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1):
        layout = Layout("i" + "o" * (n + 1), (4, 6 // groups, *(3, 2, 2)[:n]))
        FIRES[f"conv_transpose{n}d-groups{groups}"] = layout, [], conv, (
            draw(2, 4, *[4] * n), W, None, 2, 1, 1, groups, 2)  # fmt: skip


def contract(layout: Layout, chain: list, op, args: tuple):
    """(branch from the factors, the op on the dense delta) of one row of the table."""
    A, B = draw(*layout.shape_of("A", RANK)), draw(*layout.shape_of("B", RANK))
    view, dense = View.of(layout.shape), layout.delta(A, B)
    for name, given_args, *pick in chain:
        view, dense = move(name, view, given_args, {}), getattr(dense, name)(*given_args)
        if pick:
            view, dense = view[pick[0]], dense[pick[0]]
    call = forms.find(op, args, {}, lambda operand: view.ndim if operand is W else None)
    assert call is not None and call.weight is W
    call.options["rank"] = RANK
    placement = place(layout, view, call.sides)
    assert placement is not None
    branch = call.form.up(call, call.form.down(call, call.x, placement.down(A, B)), placement.up(A, B))
    return branch, op(*[dense if a is W else a for a in args]), call, view


def assert_equal_up_to_rounding(a: torch.Tensor, b: torch.Tensor, terms: int) -> None:
    """Two orders of the same sum differ by less than its number of terms times one rounding each."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= terms * torch.finfo(a.dtype).eps * float(b.abs().max())


@pytest.mark.parametrize("name", FIRES)
def test_the_branch_is_the_op_with_the_delta_as_its_weight(name):
    layout, chain, op, args = FIRES[name]
    branch, wanted, call, view = contract(layout, chain, op, args)
    assert_equal_up_to_rounding(branch, wanted, 8 * layout.size("i") * RANK)
    assert infer(layout.shape, view, call.sides) is not None


@pytest.mark.parametrize("alpha", [1, 0.7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_addmm_scales_the_branch_by_alpha_and_leaves_the_summand_alone(alpha, side):
    layout = Layout("io", (8, 6)) if side == "right" else Layout("oi", (6, 8))
    args = (draw(4, 6), draw(4, 8), W) if side == "right" else (draw(6, 4), W, draw(8, 4))
    A, B = draw(*layout.shape_of("A", RANK)), draw(*layout.shape_of("B", RANK))
    call = forms.find(torch.addmm, args, {"alpha": alpha, "beta": 0.3}, lambda o: 2 if o is W else None)
    call.options["rank"] = RANK
    placement = place(layout, View.of(layout.shape), call.sides)
    branch = call.form.up(call, call.form.down(call, call.x, placement.down(A, B)), placement.up(A, B))
    dense = [layout.delta(A, B) if a is W else a for a in args]
    assert_equal_up_to_rounding(branch, torch.addmm(*dense, alpha=alpha, beta=0.0), 8 * 8 * RANK)


def test_grouped_mm_pads_the_rank_for_the_kernel():
    layout, x = Layout("boi", (3, 16, 8)), torch.randn(10, 8)
    offsets = torch.tensor([4, 4, 10], dtype=torch.int32)
    A, B = torch.randn(*layout.shape_of("A", RANK)), torch.randn(*layout.shape_of("B", RANK))
    view = View.of(layout.shape).transpose(1, 2)
    call = forms.find(F.grouped_mm, (x, W), {"offs": offsets}, lambda o: 3 if o is W else None)
    call.options["rank"] = RANK
    placement = place(layout, view, call.sides)
    branch = call.form.up(call, call.form.down(call, x, placement.down(A, B)), placement.up(A, B))
    wanted = F.grouped_mm(x, layout.delta(A, B).transpose(1, 2), offs=offsets)
    assert_equal_up_to_rounding(branch, wanted, 8 * 8 * RANK)


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (F.linear, (W, W), {}),  # a product of two weights
        (torch.add, (draw(6, 8), W), {}),
        (torch.mul, (draw(6, 8), W), {}),
        (torch.einsum, ("bd,od->b", draw(2, 8), W), {}),  # sums over the weight's rows
        (torch.einsum, ("ab,cd->abcd", draw(2, 8), W), {}),  # contracts nothing
        (torch.einsum, ("bi,oo->bi", draw(2, 8), W), {}),  # a trace
        (torch.einsum, ("bi,bi,oi->bo", draw(2, 8), draw(2, 8), W), {}),  # more than two operands
        (F.embedding, (ids(2, 4), W), {"max_norm": 1.0}),  # renormalises the weight itself
        (F.conv1d, (draw(2, 4, 9), W), {}),  # a weight of two axes is no kernel
        (F.grouped_mm, (draw(10, 8), W), {"offs": None}),
    ],
)
def test_what_is_no_matmul_with_the_weight_does_not_fire(op, args, kwargs):
    assert forms.find(op, args, kwargs, lambda operand: 2 if operand is W else None) is None


@given(st.permutations("boi"), st.tuples(*[st.integers(1, 4)] * 3))
def test_delta_has_the_weight_axes_in_any_order(order, shape):
    layout = Layout("".join(order), shape)
    A, B = draw(*layout.shape_of("A", 2)), draw(*layout.shape_of("B", 2))
    wanted = torch.einsum(f"bor,bri->{''.join(order)}", B, A)
    assert layout.delta(A, B).shape == layout.shape
    assert_equal_up_to_rounding(layout.delta(A, B), wanted, 8)


def test_views_that_only_the_dense_delta_serves():
    layout = Layout("oi", (6, 8))
    across = View.of((6, 8)).reshape([12, 4])  # splits the in axis over the rows
    assert place(layout, across, "oi") is None
    assert place(layout, View.of((6, 8)).expand((2, 6, 8)), "ooi") is None
