"""Defects of `lora_fx/deltas`: the schedules and their kernels."""

from __future__ import annotations

from tests.mutants.table import Mutant

ROWS = (
    # ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fused_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "add(_part(rows, first, B), z.mT, B.mT, alpha=scale)", "add(_part(rows, first, B), z.mT, B.mT)",
        "The branch that is accumulated in place is x·A·B, without its scale.",
        laws="l2",
    ),
    Mutant(
        "fused_part_at_the_front", "schedules", "lora_fx/deltas/kernels.py",
        "rows.narrow(-1, first, B.size(-2))", "rows.narrow(-1, 0, B.size(-2))",
        "An adapter of the value rows of a fused weight acts on its first rows.",
    ),
    Mutant(
        "dense_schedule_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "            total = add(total, left, right, alpha=scale)", "            total = add(total, left, right)",
        "W + B·A, without its scale, where the tokens are many.",
    ),
    Mutant(
        "dense_part_at_the_front", "schedules", "lora_fx/deltas/kernels.py",
        "total.tensor_split((first, first + B.shape[-2]), dim=axis)", "total.tensor_split((0, B.shape[-2]), dim=axis)",
        "Where the tokens are many, an adapter of the value rows of a fused weight acts on its first rows.",
    ),
    Mutant(
        "dense_drops_the_whole_input", "schedules", "lora_fx/deltas/schedules.py",
        "dense = dense and (dropped is None or dropped is x)", "dense = dense",
        "Where the tokens are many, dropout on the branch is forgotten.",
    ),
    Mutant(
        "gradient_of_a_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "grad_a = scaled(A, z, own, beta=0, alpha=scale)", "grad_a = scaled(A, z, own, beta=0)",
        "A learns at another rate than B.",
    ),
    Mutant(
        "gradient_of_x_without_branch", "schedules", "lora_fx/deltas/kernels.py",
        "add(grad_x, z.mT, A, alpha=scale)", "pass",
        "What flows back to earlier layers misses the branch's share.",
    ),
    Mutant(
        "product_of_the_wrong_operands", "schedules", "lora_fx/deltas/rematerialization.py",
        "return self.left(kept) * self.right(kept)", "return self.left(kept) * self.left(kept)",
        "In backward, the input of a site is made again from one of its two operands.",
        tests=("tests/test_rematerialization.py",),
    ),
    Mutant(
        "dropout_of_a_gpu_scaled_by_its_probability", "schedules", "lora_fx/deltas/rematerialization.py",
        "1 / (1 - node._saved_p)", "1 / node._saved_p",
        "What torch's dropout on a GPU made is made again with another scale: A has a wrong gradient.",
        tests=("tests/test_rematerialization.py::test_what_dropout_on_a_gpu_made_is_made_again",),
    ),
    Mutant(
        "input_of_dropout_kept", "schedules", "lora_fx/deltas/rematerialization.py",
        "before = recipe(source, reader)", "before = None",
        "What dropout read is kept where it can be made again.",
        tests=("tests/test_rematerialization.py::test_of_dropout_on_a_gpu_its_mask_is_kept_and_nothing_else",),
    ),
    Mutant(
        "one_pass_gradient_not_dropped", "schedules", "lora_fx/deltas/one_pass.py",
        'gpu_kernels.written(dx, h, A.mT, scale, add=k > 0, drop=drop)',
        'gpu_kernels.written(dx, h, A.mT, scale, add=k > 0)',
        "On a GPU what flows back to x is not dropped where x was.",
        tests=("tests/test_one_pass.py",),
    ),
    Mutant(
        "one_pass_gradient_of_a_unscaled", "schedules", "lora_fx/deltas/one_pass.py",
        'gpu_kernels.passed(own, z=h, scale=scale, drop=drop)',
        'gpu_kernels.passed(own, z=h, drop=drop)',
        "On a GPU A learns at another rate.",
        tests=("tests/test_one_pass.py",),
    ),
    Mutant(
        "one_pass_of_the_first_features", "schedules", "lora_fx/deltas/one_pass.py",
        'mine, flows, z = g.narrow(1, first, len(B))',
        'mine, flows, z = g.narrow(1, 0, len(B))',
        "On a GPU the branch of a part of W learns from another part.",
        tests=("tests/test_one_pass.py",),
    ),
    Mutant(
        "one_pass_drops_another_input", "schedules", "lora_fx/deltas/one_pass.py",
        'type(dropped) is Dropped and dropped.is_of(x)',
        'type(dropped) is Dropped',
        "On a GPU a branch whose dropout read something else reads x.",
        tests=("tests/test_one_pass.py",),
    ),
    Mutant(
        "one_pass_columns_dropped_alike", "schedules", "lora_fx/deltas/gpu_kernels.py",
        '    key = _mixed(_mixed(rows.to(tl.uint32) ^ low.to(tl.uint32)) ^ high.to(tl.uint32))\n',
        '    key = _mixed(_mixed(rows.to(tl.uint32) * 0 ^ low.to(tl.uint32)) ^ high.to(tl.uint32))\n',
        "On a GPU dropout drops the same features of every token.",
        tests=("tests/test_one_pass.py",),
    ),
    Mutant(
        "one_pass_unproven", "schedules", "lora_fx/deltas/triton_route.py",
        '            self.prove(device)\n',
        '            pass\n',
        "Kernels are used on a device on which nobody has seen what they compute.",
        tests=("tests/test_triton_route.py",),
    ),
    Mutant(
        "full_device_refused", "schedules", "lora_fx/deltas/triton_route.py",
        '            if not is_full(error):\n                self.refuse(device, error)\n            return False\n',
        '            self.refuse(device, error)\n            return False\n',
        "A GPU that was full when it was asked first never runs a kernel.",
        tests=("tests/test_triton_route.py",),
    ),
    Mutant(
        "norm_of_another_product", "schedules", "lora_fx/deltas/gpu_kernels.py",
        'tl.store(to + row * columns + at, (outer * inner)',
        'tl.store(to + row * columns + at, (outer + inner)',
        "On a GPU a norm's output is made again as a sum.",
        tests=("tests/test_one_pass.py",),
    ),
    Mutant(
        "product_shared_for_ever", "schedules", "lora_fx/deltas/rematerialization.py",
        "        if shared.left == 0:\n            shared.value = None\n", "",
        "What is made again in backward is never let go.",
        tests=("tests/test_rematerialization.py",),
    ),
    Mutant(
        "compiled_without_dropout", "schedules", "lora_fx/deltas/compiled_schedules.py",
        "dropped or [None] * len(scales)", "[None] * len(scales)",
        "The op that a compiled model runs takes x, where dropout has made another input of it.",
    ),
    Mutant(
        "exported_with_an_op_of_ours", "schedules", "lora_fx/deltas/compiled_schedules.py",
        "        or torch.compiler.is_exporting()\n", "",
        "An exported program cannot be read without lora_fx.",
    ),
    Mutant(
        "second_order_through_constants", "schedules", "lora_fx/deltas/schedules.py",
        "        if torch.is_grad_enabled():\n            return _diff", "        if False:\n            return _diff",
        "Second derivatives take x·Aᵀ for a constant.",
    ),
    Mutant(
        "schedule_in_place_under_vmap", "schedules", "lora_fx/deltas/schedules.py",
        "        or _transforms()\n        or _traces()\n", "",
        "Accumulating in place meets a transformed call.",
    ),
    Mutant(
        "output_is_a_view", "schedules", "lora_fx/deltas/kernels.py",
        "return _unsafe_view(y, y.shape) if y._is_view() else y", "return y",
        "What comes after a matmul must not write into what it gets.",
    ),
    Mutant(
        "in_place_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "addmm_(z, B.t(), alpha=scale)", "addmm_(z, B.t())",
        "A small call computes x·A·B, without its scale.",
    ),
    Mutant(
        "in_place_part_at_the_front", "schedules", "lora_fx/deltas/kernels.py",
        "_part(y, first, B).addmm_", "_part(y, 0, B).addmm_",
        "In a small call an adapter of the value rows of a fused weight acts on its first rows.",
    ),
    Mutant(
        "stale_factors", "schedules", "lora_fx/deltas/kernels.py",
        "def cast(", "@__import__('functools').lru_cache\ndef cast(",
        "Factors cast for one call are taken for the next, whatever was written to them since.",
        tests=("tests/test_schedules.py::test_factors_written_to_behind_their_version_counters_act_in_the_next_call",),
    ),
    Mutant(
        "sum_lies_otherwise", "schedules", "lora_fx/deltas/schedules.py",
        " and weight.is_contiguous()", "",
        "A fresh adapter changes the last bits where W does not lie in order.",
    ),
    Mutant(
        "in_place_under_a_mode", "schedules", "lora_fx/deltas/schedules.py",
        "        or (_modes() and not only_looked_at())", "        or False",
        "Selective checkpointing finds that what it kept has been written to.",
    ),
    # ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "kept_without_scale", "dropping", "lora_fx/deltas/dropping.py",
        ".mul_(2**_BITS / (2**_BITS - dropped))", "",
        "Dropout makes the branch smaller in training than it is afterwards.",
    ),
    Mutant(
        "drops_what_it_should_keep", "dropping", "lora_fx/deltas/dropping.py",
        "dropped - 2 ** (_BITS - 1)", "2 ** (_BITS - 1) - dropped",
        "1 − p of the elements are dropped.",
    ),
    Mutant(
        "a_bit_that_is_never_drawn", "dropping", "lora_fx/deltas/dropping.py",
        "random_(-(2**63), None)", "random_()",
        "Every fourth element is dropped less often.",
    ),
    Mutant(
        "captured_with_draws_of_ours", "dropping", "lora_fx/deltas/dropping.py",
        "return not captured and ", "return ",
        "A program that is captured shows how dropout is drawn, instead of dropout.",
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "written_product_made_again", "gradients", "lora_fx/deltas/rematerialization.py",
        "    if tensor._version:", "    if False:",
        "A product that was written to without gradients is made again as it was before.",
        tests=("tests/test_rematerialization.py::test_a_product_that_was_written_to_is_kept_as_it_is",),
    ),
    Mutant(
        "unseen_write_to_a_product_on_a_gpu", "gradients", "lora_fx/deltas/rematerialization.py",
        "_found_out[reader] = torch.equal(make(operands).reshape(tensor.shape), tensor)", "_found_out[reader] = True",
        "On a GPU a product is made again as it was before a write to its .data.",
        tests=("tests/test_rematerialization.py::test_a_device_that_has_to_be_waited_for_is_asked_once_for_each_reader",),
    ),
    Mutant(
        "unseen_write_to_a_product", "gradients", "lora_fx/deltas/rematerialization.py",
        "        return torch.equal(make(operands).reshape(tensor.shape), tensor)\n", "        return True\n",
        "A product is made again as it was before a write to its .data, or to a product before it.",
        tests=("tests/test_rematerialization.py::test_a_product_that_was_written_to_unseen_is_kept_as_it_is",),
    ),
    Mutant(
        "backward_autocasts", "gradients", "lora_fx/deltas/schedules.py",
        "        if _autocasts():  # it", "        if False:  # it",
        "A backward inside of autocast raises, where the forward was outside.",
        tests=("tests/test_schedules.py::test_a_backward_inside_of_autocast_is_that_of_its_forward",),
    ),
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "a_sum_laid_out_anew", "schedules", "lora_fx/deltas/schedules.py",
        "    return result.as_strided(result.shape, strides)", "    return result",
        "An axis of one element gets another stride, and torch's convolutions round in another order.",
    ),
    Mutant(
        "nested_tensor_scheduled", "schedules", "lora_fx/deltas/schedules.py",
        "        or x.is_nested\n", "",
        "A nested tensor is asked for its shape, which torch refuses.",
        tests=("tests/test_schedules.py::test_a_nested_tensor_has_the_branch_of_its_parts",),
    ),
    Mutant(
        "vmap_draws_raw", "dropping", "lora_fx/deltas/dropping.py",
        "    return any(own", "    return all(own",
        "A vmap that may not draw, with one inside that may, is torch's raw error.",
        tests=("tests/test_dropping.py::test_a_vmap_that_may_not_draw_is_refused_with_the_way_that_works",),
    ),
)  # fmt: skip
