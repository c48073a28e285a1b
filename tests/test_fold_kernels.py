"""The kernels of a fold, in Triton's interpreter and compiled for a card that is not here."""

from __future__ import annotations

import pytest

from tests.interpreted import passes


def test_the_kernels_do_in_the_interpreter_what_torch_does():
    pytest.importorskip("triton")
    passes("fold.py")


@pytest.mark.parametrize(("kind", "factors", "back"), [("bfloat16", "float32", True), ("float32", "float64", False)])
def test_the_kernels_compile_for_a_card_that_is_not_here(kind, factors, back):
    """The interpreter takes more Python than the compiler."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_fx.deltas import fold_kernels as kernels

    raw, fixed = {"bfloat16": "*i16", "float32": "*i32", "float64": "*i64"}, {"KIND": kind, "FACTORS": factors}
    fixed |= {"UNDOABLE": back, "right_column": 1, "BLOCK": 1024}
    names = ("ROWS", "COLUMNS", "RANKS", "SLOTS", "ANSWERS", "TIMES", "APART")
    fixed |= {name: getattr(kernels, name) for name in names}
    types = {"weight": raw[kind], "flat": raw[kind], "numbers": raw[kind], "left": raw[factors], "right": raw[factors]}
    types |= {"answers": "*i64", "places": "*i32", "nibbles": "*u8"} | dict.fromkeys(fixed, "constexpr")
    for kernel in (kernels.fold, kernels.put):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        known = {(k,): fixed[name] for k, name in enumerate(kernel.arg_names) if name in fixed}
        source = ASTSource(kernel, signature, constexprs=known)
        target = GPUTarget("cuda", 90, 32)
        ptx = triton.compile(source, target=target, options={"enable_fp_fusion": True}).asm["ptx"]
        assert "ftz" not in ptx and ".approx" not in ptx, "subnormals are kept, and every operation is rounded right"
        assert kernel is kernels.put or ptx.count("mma.sync.aligned.m8n8k4.row.col.f64") >= 8, "d and its bound, by 16"
