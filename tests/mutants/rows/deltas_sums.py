"""Defects of `lora_fx/deltas`: the sums of a fold, how they are rounded, and the way back."""

from __future__ import annotations

from tests.mutants.table import GAPS, Mutant, of_kinds

ROWS = (
    # ── fold ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fold_transposed", "fold", "lora_fx/deltas/exact_sum.py",
        "layout.to_weight(_in_order(A, B))", "layout.to_weight(_in_order(A, B).mT)",
        "The delta is folded in transposed; a reshape makes it fit.",
    ),
    Mutant(
        "fold_transposed_below_float64", "fold", "lora_fx/deltas/exact_sum.py",
        "(B, A) if sides.endswith(\"oi\") else (A.mT, B.mT)",
        "((B @ A).mT.reshape(B.shape[-2], -1), torch.eye(A.shape[-1]).double())",
        "The same where the weight is narrower than float64, whose delta is a matmul.",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "fold_inputs_first_as_outputs_first", "fold", "lora_fx/deltas/exact_sum.py",
        "else (A.mT, B.mT)", "else ((B @ A).reshape(A.shape[-1], -1), torch.eye(B.shape[-2]).double())",
        "A weight that lies (in, out) takes the delta in the order of one that lies (out, in).",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "fold_without_scale", "fold", "lora_fx/deltas/exact_sum.py",
        "A, B, layout = self.of.A, self.of.B * self.of.scale,", "A, B, layout = self.of.A, self.of.B,",
        "The fold forgets the scale that the branch has.",
    ),
    Mutant(
        "fold_last_rank_lost", "fold", "lora_fx/deltas/exact_sum.py",
        "for k in range(1, A.shape[-2]):", "for k in range(1, A.shape[-2] - 1):",
        "The last of several components is not folded; rank 1 shows nothing.",
    ),
    Mutant(
        "fold_reads_b_in_half", "fold", "lora_fx/deltas/exact_sum.py",
        "B=delta.whole.clone()", "B=delta.whole.to(torch.bfloat16).to(delta.B.dtype)",
        "B is rounded to bfloat16 on its way into the weight.",
    ),
    Mutant(
        "fold_blocks_forget_heads", "fold", "lora_fx/deltas/exact_sum.py",
        "rows = slice(start * per_row, stop * per_row)", "rows = slice(start, stop)",
        "Where the weight's first axis is one of two on its side (heads), a block takes the factors of other rows.",
        zoo="native-einsum-attention",
        tests=(GAPS,),
    ),
    Mutant(
        "fold_last_block_left_out", "fold", "lora_fx/deltas/exact_sum.py",
        "for start in range(0, rows, step) if", "for start in range(0, max(rows - rows % step, 1), step) if",
        "The last rows of weights above a million elements are not folded.",
        tests=(GAPS,),
    ),
    Mutant(
        "nan_folded", "fold", "lora_fx/deltas/exact_sum.py",
        "if magnitude <= torch", "if not magnitude > torch",
        "Factors with NaN are folded into the weights.",
        tests=("tests/test_refusals.py", GAPS),
    ),
    Mutant(
        "overflow_folded", "fold", "lora_fx/deltas/exact_sum.py",
        "if not all(map(math.isfinite, sums)):", "if False:",
        "A sum beyond float16 is folded as Inf.",
        tests=("tests/test_refusals.py", GAPS),
    ),
    # ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fold_rounds_twice", "rounding", "lora_fx/deltas/exact_sum.py",
        "narrow = rounded.dtype != torch.float64", "narrow = False",
        "Folding converts float64 to bfloat16 as torch does, by way of float32.",
    ),
    Mutant(
        "delta_rounded_before_the_sum", "rounding", "lora_fx/deltas/exact_sum.py",
        "return total.add_(delta), delta", "return total.add_(delta.to(self.weight.dtype)), delta",
        "The delta is rounded to W's dtype, and the sum again.",
    ),
    Mutant(
        "round_once_is_plain_to", "rounding", "lora_fx/deltas/rounding.py",
        "odd = torch.where(inexact, (bits - away.to(torch.int32)) | 1, bits)", "odd = bits",
        "round_once rounds twice.",
    ),
    Mutant(
        "ties_to_odd", "rounding", "lora_fx/deltas/rounding.py",
        "near = round(x / step) * step", "near = (round(x / step - 1) + 1) * step",
        "A sum exactly between two numbers becomes the odd one.",
        tests=(GAPS,),
    ),
    Mutant(
        "doubt_ignored", "rounding", "lora_fx/deltas/exact_sum.py",
        "if len(some):  #", "if False:  #",
        "Sums too near a border for float64 to decide are rounded on a guess.",
    ),
    Mutant(
        "sieve_too_fine", "rounding", "lora_fx/deltas/rounding.py",
        "mul_(2.0**-22)", "mul_(2.0**-26)",
        "What float32 rounds away while doubtful sums are looked for is not allowed for.",
    ),
    Mutant(
        "doubt_of_the_first_tile", "rounding", "lora_fx/deltas/exact_sum.py",
        "between(total, self.error, low, high[rows], scratch)",
        "between(total, self.error, low, high[: len(low)], scratch)",
        "Each tile of a block says where its doubtful sums are in the place of the first one's.",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "tile_forgets_heads", "rounding", "lora_fx/deltas/exact_sum.py",
        "some = slice(start * self.per_row, stop * self.per_row)",
        "some = slice(start, start + (stop - start) * self.per_row)",
        "Where the weight's first axis is one of two on its side (heads), a tile takes the factors of other rows.",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "doubtful_not_kept", "rounding", "lora_fx/deltas/exact_sum.py",
        "steps.keep_in_full(places)", "pass",
        "A number whose sum was in doubt comes back by the steps from the guess of what it was not rounded to.",
        tests=("tests/test_fold.py",),
    ),
    # ── looking ahead ────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "gpu_asked_in_each_block", "ahead", "lora_fx/deltas/ahead.py",
        'return device.type != "cpu"', "return False",
        "A fold on a GPU waits for it in each block.",
    ),
    Mutant(
        "look_reads", "ahead", "lora_fx/deltas/ahead.py",
        "    if undoable:\n", "    if undoable or int(counts[0]) < 0:\n",
        "Looking ahead at a block waits for what it has found.",
    ),
    Mutant(
        "other_sums_not_allowed_for", "ahead", "lora_fx/deltas/ahead.py",
        "_TIMES = 4", "_TIMES = 1",
        "A sum that comes out another one the second time may be in doubt then, and nobody has settled it.",
    ),
    Mutant(
        "settled_not_written", "ahead", "lora_fx/deltas/exact_sum.py",
        "            rounded[found.places] = found.settled.to(rounded.dtype)\n", "            pass\n",
        "What was summed as fractions before the fold is not what is written.",
    ),
    Mutant(
        "doubt_beyond_the_room", "ahead", "lora_fx/deltas/ahead.py",
        "if doubtful > self.room or open_ > len(self.places):", "if False:",
        "Of a block with much in doubt the first few elements are looked at.",
    ),
    Mutant(
        "block_not_halved", "ahead", "lora_fx/deltas/ahead.py",
        "if smaller == sizes:", "if True:",
        "A fold whose first blocks find no memory is refused.",
    ),
    Mutant(
        "way_back_in_other_blocks", "ahead", "lora_fx/deltas/exact_sum.py",
        "zip(whole.blocks(self.elements), self.remainders, strict=True)",
        "zip(whole.blocks(_BLOCK), self.remainders, strict=True)",
        "Unfolding takes blocks of today's size, and not the fold's.",
    ),
    Mutant(
        "block_of_all_memory", "ahead", "lora_fx/deltas/exact_sum.py",
        "free // (2 * scratches", "free // (scratches",
        "A block on a GPU takes all the memory that is free, and nothing is left to compute with.",
    ),
    # ── unfold ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "unfold_off_by_one", "unfold", "lora_fx/deltas/remainder.py",
        ".sub_(_BIAS)", ".sub_(_BIAS - 1)",
        "Every unfolded number is one step of its dtype too large.",
    ),
    Mutant(
        "shaky_guess_trusted", "unfold", "lora_fx/deltas/remainder.py",
        "far.bitwise_or_(torch.bitwise_and(steps, ~15, out=moved))", "torch.bitwise_and(steps, ~15, out=far)",
        "A delta that is summed in another order on the way back can move the guess, and the weight with it.",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "unfold_reads_the_factors_of_now", "unfold", "lora_fx/deltas/exact_sum.py",
        "A=delta.A.clone(), B=delta.whole.clone()", "A=delta.A, B=delta.whole",
        "Unfolding takes out what the factors are now, not what was folded in.",
        tests=("tests/test_fold.py::test_training_an_adapter_that_is_put_away_changes_nothing",),
    ),
    Mutant(
        "checksum_always_equal", "unfold", "lora_fx/deltas/rounding.py",
        "return one == other.to(one.device)", "return one == one",
        "A weight that was written to after the fold is unfolded into nonsense.",
        tests=("tests/test_fold.py::test_unfolding_refuses_a_weight_that_was_written_to",),
    ),
    # ── folds of other kinds ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "bias_folded_twice", "kinds", "lora_fx/deltas/rounded_sum.py",
        "total += adapter.delta(plain, adapter.theta_of(wide))",
        "total += adapter.delta(plain, adapter.theta_of(wide)) * (2 if adapter.kind.adapts == 'bias' else 1)",
        "A folded bias is shifted twice.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    Mutant(
        "folded_in_sequence", "kinds", "lora_fx/deltas/rounded_sum.py",
        "adapter.delta(plain, adapter.theta_of(wide))", "adapter.delta(total, adapter.theta_of(wide))",
        "The second δ that is folded is one of W + the first.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "only_the_first_is_folded", "kinds", "lora_fx/deltas/rounded_sum.py",
        "for adapter in adapters:", "for adapter in adapters[:1]:",
        "Of two adapters on one weight the first is folded.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "sum_rounded_twice", "kinds", "lora_fx/deltas/rounded_sum.py",
        "round_once(total, dtype)", "round_once(total.float() if dtype.itemsize == 2 else total, dtype)",
        "The float64 sum goes to bfloat16 and float16 by way of float32.",
        tests=of_kinds("a_sum_is_rounded_once"),
    ),
    Mutant(
        "infinite_sum_folded", "kinds", "lora_fx/deltas/rounded_sum.py",
        "    if not finite:\n", "    if False:\n",
        "NaN in θ is folded into the weight.",
        tests=of_kinds("nan_in_theta_is_refused_before_anything_is_written"),
    ),
    Mutant(
        "original_not_kept", "kinds", "lora_fx/deltas/rounded_sum.py",
        "self._folded(), self.weight.clone()", "self._folded(), self.weight",
        "Unfolding writes back the folded weight.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "kept_weight_starts_anywhere", "kinds", "lora_fx/deltas/rounded_sum.py",
        "return same(checksum(weight), self.folded)", "return torch.tensor(True)",
        "A folded weight that was trained since is overwritten by unfold.",
        tests=of_kinds("a_folded_weight_that_was_written_to_is_not_unfolded"),
    ),
    Mutant(
        "fold_of_a_kind_not_undone", "kinds", "lora_fx/deltas/rounded_sum.py",
        "        undo.append(partial(self.weight.copy_, before))\n", "",
        "A fold that is cut short leaves the weights that it has written.",
        tests=of_kinds("a_fold_cut_short_is_undone"),
    ),
    Mutant(
        "unfold_of_a_kind_not_undone", "kinds", "lora_fx/deltas/rounded_sum.py",
        "        undo.append(partial(weight.copy_, weight.clone()))\n", "",
        "An unfold that is cut short leaves the weights that it has written.",
        tests=of_kinds("an_unfold_cut_short_is_undone"),
    ),
    # ── strengths, and room for ranks ────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "kernel_rounds_twice", "fold", "lora_fx/deltas/fold_kernels.py",
        "(high & 0x7FFFFFFF) | (bits.to(tl.int32) != 0).to(tl.int32)",
        "high & 0x7FFFFFFF",
        "The kernels round twice: what the lower half of a number has is lost.",
        tests=("tests/test_fold_kernels.py",),
    ),
    Mutant(
        "kernel_bound_forgets_the_product", "fold", "lora_fx/deltas/fold_kernels.py",
        "size = tl.dot(tl.abs(wide_l), tl.abs(wide_r), size, out_dtype=tl.float64)",
        "size = size",
        "The bound of a sum is that of W alone: what cancels or has no W is never in doubt.",
        tests=("tests/test_fold_kernels.py",),
    ),
    Mutant(
        "kernel_first_components_alone", "fold", "lora_fx/deltas/fold_kernels.py",
        "for first in range(0, rank, RANKS):",
        "for first in range(0, RANKS, RANKS):",
        "A sum of more components than one product of matrices takes has the first of them alone.",
        tests=("tests/test_fold_kernels.py",),
    ),
    Mutant(
        "kernel_last_components_lost", "fold", "lora_fx/deltas/fold_kernels.py",
        "for first in range(0, rank, RANKS):",
        "for first in range(0, rank - RANKS + 1, RANKS):",
        "Components beyond a whole group are left out.",
        tests=("tests/test_fold_kernels.py",),
    ),
    Mutant(
        "kernel_steps_change_places", "fold", "lora_fx/deltas/fold_kernels.py",
        "(even | (odd << 4))",
        "(odd | (even << 4))",
        "The two steps of a byte are exchanged.",
        tests=("tests/test_fold_kernels.py",),
    ),
    Mutant(
        "fused_scale_in_float32", "fold", "lora_fx/deltas/fused_sum.py",
        "struct.pack(\"<d\", self.scale)",
        "struct.pack(\"<d\", struct.unpack(\"<f\", struct.pack(\"<f\", self.scale))[0])",
        "The kernels get the scale as float32.",
        tests=("tests/test_fold_kernels.py",),
    ),
    Mutant(
        "fused_settled_forgotten", "fold", "lora_fx/deltas/fused_sum.py",
        "            _put(self.weight, found.places, found.settled)",
        "            pass",
        "What fractions have settled is not written.",
        tests=("tests/test_fold_kernels.py",),
    ),
)  # fmt: skip
