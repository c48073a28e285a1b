"""Defects of `lora_fx/deltas`: the kinds."""

from __future__ import annotations

from tests.mutants.table import CHECKPOINTS, GAPS, Mutant, of_combine, of_kinds, of_principal

ROWS = (
    # ── the algebra: factors, scale, forms ───────────────────────────────────────────────────────────────────────────
    Mutant(
        "alpha_for_scale", "algebra", "lora_fx/deltas/kinds.py",
        'return alpha / (math.sqrt(self.rank) if getattr(self, "scaling", "standard") == "rslora" else self.rank)',
        "return alpha",
        "The scale is alpha, in branch and fold alike, so that both agree on the wrong number.",
    ),
    Mutant(
        "rslora_is_standard", "algebra", "lora_fx/deltas/kinds.py",
        '(math.sqrt(self.rank) if getattr(self, "scaling", "standard") == "rslora" else self.rank)', "self.rank",
        "rslora divides alpha by the rank instead of its root.",
    ),
    # ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "alpha_is_one_by_default", "rules", "lora_fx/deltas/kinds.py",
        "alpha = self.rank if self.alpha is None else self.alpha", "alpha = 1 if self.alpha is None else self.alpha",
        "Without alpha the scale is 1 / rank instead of 1.",
        tests=(GAPS,),
    ),
    # ── kinds: their rows ────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "dora_starts_at_one", "kinds", "lora_fx/deltas/kinds.py",
        "theta.magnitude.copy_(dora.size(weight, theta))", "theta.magnitude.fill_(1)",
        "A fresh DoRA makes every output feature one long.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "dora_of_a_zero_feature", "kinds", "lora_fx/deltas/kinds.py",
        "if not bool(theta.magnitude.all()):", "if False:",
        "DoRA of a weight with a zero row divides 0 by 0.",
        tests=of_kinds("a_feature_without_a_direction_is_refused"),
    ),
    Mutant(
        "dora_without_magnitude", "kinds", "lora_fx/deltas/kinds.py",
        "theta.magnitude / dora.size(weight, theta) * dora.turned(weight, theta) - weight",
        "dora.turned(weight, theta) - weight",
        "Where W + δ is made, DoRA is plain LoRA.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says", "dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "bias_shifts_back", "kinds", "lora_fx/deltas/kinds.py",
        "delta=lambda weight, theta: theta.shift", "delta=lambda weight, theta: -theta.shift",
        "The shift of a bias is taken from it; whoever trains it does not notice.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    Mutant(
        "theta_for_theta_minus_w", "kinds", "lora_fx/deltas/kinds.py",
        "delta=lambda weight, theta: theta.weight - weight", "delta=lambda weight, theta: theta.weight",
        "`full` adds its weight to W instead of taking its place.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    # ── DoRA's arithmetic ────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "dora_without_scale", "kinds", "lora_fx/deltas/dora.py",
        "torch.addmm(weight, theta.B, theta.A, alpha=theta.scale)", "torch.addmm(weight, theta.B, theta.A)",
        "V is W + B·A, without its scale, in fold and forward and the checks' δ alike.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says", "dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "dora_of_experts_without_scale", "kinds", "lora_fx/deltas/dora.py",
        "return weight + theta.scale * (theta.B @ theta.A)", "return weight + theta.B @ theta.A",
        "The same where a weight has a matrix for each expert.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "dora_norm_not_detached", "kinds", "lora_fx/deltas/dora.py",
        "vector_norm(turned(weight, theta).detach(), dim=-1", "vector_norm(turned(weight, theta), dim=-1",
        "Gradients flow through the norm, except in a linear, which has gradients of its own.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_norm_over_the_outputs", "kinds", "lora_fx/deltas/dora.py",
        "turned(weight, theta).detach(), dim=-1, keepdim=True)",
        "turned(weight, theta).detach(), dim=-1 if weight.shape[-1] != weight.shape[-2] else -2, keepdim=True)",
        "Square weights have a norm for each input feature; no shape tells.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "dora_branch_with_c", "kinds", "lora_fx/deltas/dora.py",
        "product.features(c - 1) * product.base", "product.features(c) * product.base",
        "The branch adds x·Wᵀ once more: c is taken for c − 1.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_branch_without_magnitude", "kinds", "lora_fx/deltas/dora.py",
        "c = theta.magnitude / size(weight, theta)\n    return product",
        "c = torch.ones_like(theta.magnitude)\n    return product",
        "The branch of DoRA is LoRA's.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_forward_without_magnitude", "kinds", "lora_fx/deltas/dora.py",
        "F.linear(x, own.mul_(c), bias)", "F.linear(x, own, bias)",
        "A linear multiplies with V instead of W'.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_of_any_op_is_a_linear", "kinds", "lora_fx/deltas/dora.py",
        'if op != "linear" or torch', "if torch",
        "x·W with a square W is computed as x·Wᵀ.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_a_without_c", "kinds", "lora_fx/deltas/dora.py",
        "torch.mm((c * B).t(), g.t())", "torch.mm(B.t(), g.t())",
        "A of DoRA learns as if every c were 1, which it is at the start.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_a_without_scale", "kinds", "lora_fx/deltas/dora.py",
        ".mm(rows).mul_(ctx.scale)", ".mm(rows)",
        "A of DoRA learns at another rate than B.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_b_without_c", "kinds", "lora_fx/deltas/dora.py",
        ".mm(g).mul_(ctx.scale).t() * c", ".mm(g).mul_(ctx.scale).t()",
        "B of DoRA learns as if every c were 1.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_b_without_scale", "kinds", "lora_fx/deltas/dora.py",
        ".mm(g).mul_(ctx.scale).t() * c", ".mm(g).t() * c",
        "B of DoRA learns at another rate than A.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_m_not_divided", "kinds", "lora_fx/deltas/dora.py",
        "grad_m = (g * own).sum(0).unsqueeze(-1) / size", "grad_m = (g * own).sum(0).unsqueeze(-1)",
        "The magnitude's gradient is m times too large.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_m_with_the_bias", "kinds", "lora_fx/deltas/dora.py",
        "plain = y.clone() if bias is None else y - bias", "plain = y.clone()",
        "The magnitude learns from the bias too.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_a_magnitude_of_zero", "kinds", "lora_fx/deltas/dora.py",
        "if not bool((magnitude != 0).all()):", "if False:",
        "A magnitude of 0 gets the gradient 0 / 0.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_keeps_what_others_write", "kinds", "lora_fx/deltas/dora.py",
        "y.clone() if bias is None", "y if bias is None",
        "An in-place op behind a linear without a bias writes into what the magnitude's gradient is made of.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_x_through_w", "kinds", "lora_fx/deltas/dora.py",
        "torch.mm(g, torch.addmm(weight, B, A, alpha=ctx.scale).mul_(c))", "torch.mm(g, weight)",
        "What flows back to earlier layers goes through W instead of W'.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_second_order_through_constants", "kinds", "lora_fx/deltas/dora.py",
        "        if torch.is_grad_enabled():\n            return None", "        if False:\n            return None",
        "Second derivatives of DoRA's linear take its saved numbers for constants.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_second_order_through_the_norm", "kinds", "lora_fx/deltas/dora.py",
        "torch.linalg.vector_norm(own.detach(), dim=-1", "torch.linalg.vector_norm(own, dim=-1",
        "With create_graph=True the gradients flow through the norm.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    # ── the trial of a kind from outside ─────────────────────────────────────────────────────────────────────────────
    Mutant(
        "start_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(not bool(own.any()), reason, remedy)", "self.require(own is not None, reason, remedy)",
        "A kind whose fresh adapter changes the model is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "shape_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(fits, f\"{name} is {got}", "self.require(True, f\"{name} is {got}",
        "A kind whose δ has other axes than W is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "writing_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        'self.require(same, "δ writes', 'self.require(True, "δ writes',
        "A kind whose δ changes W is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "drawing_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "torch.equal(own, self._delta(wide, weight, seed=1)), \"δ is another", "own is not None, \"δ is another",
        "A kind with another δ each time is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "gradients_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(not missed, ", "self.require(True, ",
        "A kind with a tensor that never learns is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "narrow_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "        self._check_narrow(wide, weight, own)\n", "",
        "A kind that is another one in float32 is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "wide_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "        self._check_wide(wide, weight, own)\n", "",
        "A kind that rounds to float32 on the way is taken, and its folds with it.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "branch_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "            off <= bound and len(pairs) == 1 + len(inputs),\n", "            True,\n",
        "A kind whose branch is not x·δᵀ is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "names_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(not taken, ", "self.require(True, ",
        "A kind with a tensor called `layout` is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "settings_of_another_kind", "kinds", "lora_fx/deltas/kinds.py",
        "            if name not in self.settings:\n", "            if not name:\n",
        "kind='full', rank=4 is no error.",
        tests=of_kinds("settings_that_a_kind_does_not_have"),
    ),
    Mutant(
        "required_setting_not_given", "kinds", "lora_fx/deltas/kinds.py",
        "for name, value in settings.items() if value is REQUIRED]", "for name in () if settings[name] is REQUIRED]",
        "A DoRA without a rank is found out late.",
        tests=of_kinds("settings_that_a_kind_does_not_have"),
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "directions_at_random", "checkpoints", "lora_fx/deltas/nearest.py",
        "_ROUNDS = 4", "_ROUNDS = 0",
        "An extracted adapter holds the first directions that were drawn, and not the largest.",
        tests=(f"{CHECKPOINTS}::test_the_nearest_of_a_rank_is_kept",),
    ),
    Mutant(
        "truncates_the_smallest", "kinds", "lora_fx/deltas/nearest.py",
        "    root = S[..., :rank].sqrt()", "    root = S.flip(-1)[..., :rank].sqrt()",
        "The nearest of a rank has the sizes of the directions that matter least.",
        tests=of_combine("svd_is_the_nearest_of_a_rank_and_says_what_it_keeps"),
    ),
    Mutant(
        "ties_elects_by_strength", "kinds", "lora_fx/deltas/merging.py",
        "elected = torch.where(kept.sum(0) >= 0,", "elected = torch.where(summed(kept, strengths) >= 0,",
        "TIES elects the signs of what is weighed, and turns round what has a negative strength.",
        tests=of_combine("ties_trims_elects_and_takes_the_mean_of_what_agrees"),
    ),
    Mutant(
        "dare_does_not_rescale", "kinds", "lora_fx/deltas/merging.py",
        "delta.mul(mask).div_(density)", "delta.mul(mask)",
        "What DARE leaves is smaller than what it was made of.",
        tests=of_combine("dare_drops_at_random_and_rescales"),
    ),
    Mutant(
        "pissa_forgets_its_start", "kinds", "lora_fx/deltas/principal.py",
        "torch.cat((theta.B, theta.B - theta.B0), -1)", "torch.cat((theta.B, theta.B.detach() - theta.B0), -1)",
        "A part of the gradient of B is left out.",
        tests=of_principal("training_is_that_of_the_papers_with_their_changed_base"),
    ),
    Mutant(
        "pissa_starts_without_its_scale", "kinds", "lora_fx/deltas/principal.py",
        "(S[..., : theta.rank] / abs(theta.scale)).sqrt()", "S[..., : theta.rank].sqrt()",
        "What PiSSA starts at is the leading part of W, times the scale.",
        tests=of_principal("pissa_starts_at_the_nearest_of_its_rank"),
    ),
    Mutant(
        "every_kind_folds_exactly", "kinds", "lora_fx/deltas/kinds.py",
        '"exactly" if self.low_rank else "rounded once"', '"exactly"',
        "The plan promises more than the fold does.",
        tests=of_kinds("the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds"),
    ),
    Mutant(
        "plan_without_the_cost", "kinds", "lora_fx/deltas/kinds.py",
        'return "its own branch" if beside else f"{self.adapts} + δ"', 'return "its own branch"',
        "The plan does not say that W + δ is made in each forward.",
        tests=of_kinds("the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds"),
    ),
)  # fmt: skip
