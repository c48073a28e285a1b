"""`View` is torch's own stride arithmetic, op for op."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.graph.views import MOVES, View, move


@st.composite
def chains(draw):
    """A shape and a few movement ops on it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    return shape, draw(st.lists(st.tuples(st.sampled_from(sorted(OPS)), st.randoms()), max_size=4))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def random_shape(random, n: int) -> list[int]:
    shape = []
    while n > 1 and len(shape) < 4:
        shape.append(random.choice(divisors(n)))
        n //= shape[-1]
    return [*shape, n]


def dim(random, t) -> int:
    return random.randrange(-t.ndim, t.ndim)


#: op → random arguments for a tensor
OPS = {
    "transpose": lambda r, t: (dim(r, t), dim(r, t)),
    "permute": lambda r, t: (r.sample(range(t.ndim), t.ndim),),
    "view": lambda r, t: (random_shape(r, t.numel()),),
    "reshape": lambda r, t: (random_shape(r, t.numel()),),
    "select": lambda r, t: (d := dim(r, t), r.randrange(t.shape[d])),
    "narrow": lambda r, t: (d := dim(r, t), s := r.randrange(t.shape[d]), r.randint(1, t.shape[d] - s)),
    "unsqueeze": lambda r, t: (r.randint(0, t.ndim),),
    "squeeze": lambda r, t: (),
    "chunk": lambda r, t: (r.randint(1, 3), dim(r, t)),
    "split": lambda r, t: (r.randint(1, 3), dim(r, t)),
    "unbind": lambda r, t: (dim(r, t),),
    "movedim": lambda r, t: (dim(r, t), dim(r, t)),
    "flatten": lambda r, t: (0, dim(r, t)),
    "unflatten": lambda r, t: (d := dim(r, t), (r.choice(divisors(t.shape[d])), -1)),
    "expand": lambda r, t: ([2, *t.shape],),
    "__getitem__": lambda r, t: (
        r.choice([0, slice(1, None, 2), (None, ...), (..., slice(None, None, 2)), (slice(0, 1), ...)]),
    ),
}


def same(tensor: torch.Tensor, view: View) -> bool:
    if tensor.numel() == 0:
        return tuple(tensor.shape) == view.shape
    strides = all(a == b or n == 1 for a, b, n in zip(tensor.stride(), view.strides, tensor.shape, strict=True))
    return tuple(tensor.shape) == view.shape and tensor.storage_offset() == view.offset and strides


@given(chains())
def test_a_view_is_what_torch_makes_of_it(chain):
    shape, ops = chain
    tensor, view = torch.empty(shape, device="meta"), View.of(shape)
    for op, random in ops:
        if tensor.ndim == 0 or 0 in tensor.shape:
            return
        args = OPS[op](random, tensor)
        try:
            wanted = getattr(tensor, op)(*args)
        except RuntimeError:  # a view that needs a copy
            assert move(op, view, args, {}) is None
            return
        found = move(op, view, args, {})
        if op in ("reshape", "flatten") and found is None:  # torch copies here; a view cannot
            assert wanted.untyped_storage()._cdata != tensor.untyped_storage()._cdata
            return
        if isinstance(wanted, tuple):
            assert len(wanted) == len(found) and all(map(same, wanted, found))
            tensor, view = wanted[-1], found[-1]
            continue
        assert same(wanted, found), (op, args, tensor.shape, tensor.stride())
        tensor, view = wanted, found


def test_a_gather_is_no_view():
    view = View.of((4, 3))
    assert move("__getitem__", view, (torch.tensor([0, 1]),), {}) is None
    assert move("__getitem__", view, (True,), {}) is None
    assert move("no_such_op", view, (), {}) is None


def test_every_op_of_the_table_is_one_of_torch():
    assert all(hasattr(torch.Tensor, op) or op in ("slice", "getitem", "_unsafe_view", "numpy_T") for op in MOVES)


def test_an_argument_under_a_name_that_is_not_known_is_no_argument_left_out():
    assert move("swapaxes", View.of((3, 4, 5)), (), {"axis0": 0, "axis1": 2}) is None  # dense, and not the first two
    assert move("transpose", View.of((3, 4, 5)), (), {"dim0": 0, "dim1": 2}) == View.of((3, 4, 5)).transpose(0, 2)


def test_a_view_without_elements_has_whatever_shape_it_is_given():
    assert View.of((0, 4)).reshape((0, 2, 2)).shape == torch.empty(0, 4).reshape(0, 2, 2).shape
    assert View.of((0, 4)).reshape((-1, 4)).shape == (0, 4)
    assert View.of((3, 4)).reshape((0, 4)) is None
