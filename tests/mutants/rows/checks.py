"""Defects of `lora_fx/checks`."""

from __future__ import annotations

from tests.mutants.table import (
    GAPS,
    GRADIENTS,
    MEMORY,
    Mutant,
    of_kinds,
    of_prefixes,
    of_rewrite_checks,
    of_rewrites,
    of_sites,
)

ROWS = (
    # ── verification ─────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "self_check_in_eval_only", "verification", "lora_fx/checks/certification.py",
        "for training in (False, True)]", "for training in (False,)]",
        "apply does not look at the path that the model takes in train mode.",
        tests=(GAPS,),
    ),
    Mutant(
        "uses_unchecked_in_bfloat16", "verification", "lora_fx/checks/certification.py",
        "        if row.error > row.bound:\n            raise EquivalenceError(",
        "        if False:\n            raise EquivalenceError(",
        "What rounding in bfloat16 hides in the outputs of the whole model is not looked for at its uses.",
        tests=("tests/test_certificate.py::test_apply_sees_a_small_fault_in_bfloat16",),
    ),
    Mutant(
        "weights_that_decide_are_uses", "verification", "lora_fx/checks/certification.py",
        "if captured.transformed or flow.unmeasured or", "if captured.transformed or",
        "What a forward does with a weight beside multiplying is not checked in bfloat16.",
        tests=("tests/test_certificate.py::test_what_no_use_shows_is_checked_with_the_sums",),
    ),
    Mutant(
        "uses_measured_in_their_own_dtype", "verification", "lora_fx/checks/uses.py",
        "            rows = self._judged(reading, *computed())\n", "            raise NotImplementedError\n",
        "The certificate measures a use in the dtype of the model, where rounding could hide its effect.",
        tests=("tests/test_certificate.py::test_what_rounding_in_its_dtype_would_hide_is_measured_in_float64",),
    ),
    Mutant(
        "one_row_is_measured", "verification", "lora_fx/checks/uses.py",
        "        x, y = x[finite], y[finite]\n",
        "        x, y, finite = x[finite][:1], y[finite][:1], finite.nonzero()[:1, 0]\n",
        "The check looks at the first row of x alone, and not at a sum of all of them.",
        tests=("tests/test_certificate.py::test_apply_sees_a_small_fault_in_bfloat16",),
    ),
    Mutant(
        "padding_hides_the_rest", "verification", "lora_fx/checks/uses.py",
        "finite = x.isfinite().all(-1) & y.isfinite().all(-1)", "finite = x.isfinite().all(-1) | True",
        "One NaN in a row of padding makes every sum NaN, which equals any other.",
        tests=("tests/test_certificate.py::test_products_of_rows_are_measured_without_their_weights",),
    ),
    Mutant(
        "self_check_leaves_b", "verification", "lora_fx/checks/verification.py",
        "undo.append(partial(parameter.detach().copy_, parameter.detach().clone()))", "pass",
        "After apply B holds the random numbers of the check.",
    ),
    Mutant(
        "self_check_leaves_the_sum", "verification", "lora_fx/checks/verification.py",
        "undo.append(partial(weight.index_copy_, axis, changed, old))", "pass",
        "After apply the base weights hold the dense sum of the check.",
    ),
    Mutant(
        "bound_too_lax", "verification", "lora_fx/checks/verification.py",
        "SLACK = 16.0", "SLACK = 1e6",
        "An error of a million times the noise passes.",
    ),
    Mutant(
        "nan_is_no_difference", "verification", "lora_fx/checks/verification.py",
        "    if not bool(difference.isfinite().all()):\n        return math.inf",
        "    if not bool(difference.isfinite().all()):\n        return 0.0",
        "A model that gives NaN is equivalent to any other.",
        tests=(GAPS,),
    ),
    Mutant(
        "only_the_first_output", "verification", "lora_fx/checks/verification.py",
        "top = max(reports, key=", "top = max(reports[:1], key=",
        "verify looks at the first output of a model alone.",
        tests=(GAPS,),
    ),
    # ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "a_bound_of_infinity", "export", "lora_fx/checks/verification.py",
        "max(filter(math.isfinite, (relative_error(other, exact, exact) for other in others)), default=0.0)",
        "max((relative_error(other, exact, exact) for other in others), default=0.0)",
        "Where the float64 copy overflows, every file is the model.",
        tests=("tests/test_onnx_padding.py::test_a_number_that_is_not_finite_gives_no_bound",),
    ),
    # ── checks of other kinds ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "no_delta_for_the_checks", "kinds", "lora_fx/checks/oracles.py",
        "return adapter.layout.to_weight(adapter.embedded(own)) * adapter.strength",
        "return torch.zeros_like(weight, dtype=torch.float64)",
        "The checks take a kind without factors for nothing.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "any_sum_is_rounded_right", "kinds", "lora_fx/checks/oracles.py",
        "SHARE = 2.0**-46", "SHARE = 2.0**40",
        "Whatever a fold of such a kind has written, the checks find it right.",
        tests=of_kinds("the_checks_find_every_element_that_is_one_step_off"),
    ),
    Mutant(
        "one_step_off_is_right", "kinds", "lora_fx/checks/oracles.py",
        "right = ((low + value) / 2 - lost <= total) & (total <= (value + high) / 2 + lost)",
        "right = (low - lost <= total) & (total <= high + lost)",
        "The checks take the next number but one for the nearest.",
        tests=of_kinds("the_checks_find_every_element_that_is_one_step_off"),
    ),
    Mutant(
        "self_check_leaves_theta_at_its_start", "kinds", "lora_fx/checks/verification.py",
        "            scatter(adapter, weight, generator, 0.5)\n", "            pass\n",
        "apply looks at kinds without factors where their δ is 0.",
        tests=of_kinds("the_self_check_moves_theta_of_every_kind"),
    ),
    Mutant(
        "mixed_not_followed", "kinds", "lora_fx/checks/flow.py",
        "if (own := self.factors.get(n) or self.mixed.get(n))", "if (own := self.factors.get(n))",
        "A sum with a δ that is made of W is not known for one.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "two_sums_are_one", "sites", "lora_fx/checks/flow.py",
        "if plain and _is_add(node) and any(", "if _is_add(node) and any(",
        "Of two adapted weights that are added before they multiply, the certificate holds one.",
        tests=of_sites("a sum of two"),
    ),
    Mutant(
        "certificate_writes_into_the_model", "sites", "lora_fx/checks/uses.py",
        "return own.clone() if argument in written else own", "return own",
        "A use in place is held against one that has been written into already.",
        tests=("tests/test_certificate.py::test_what_writes_in_place_is_measured_as_it_is",),
    ),
    Mutant(
        "uses_of_constants_uncounted", "sites", "lora_fx/checks/flow.py",
        "used = pure and bool(carried) and self._multiplies(node)", "used = False",
        "A Linear on a constant is taken for a part of the next weight.",
        tests=of_sites("linears on a constant"),
    ),
    Mutant(
        "parts_counted_from_their_own_start", "verification", "lora_fx/checks/oracles.py",
        "found.append(wrong + start * row)", "found.append(wrong)",
        "Of a large weight the wrong elements are those of its first part.",
        tests=("tests/test_testing.py::test_misrounded_elements_are_those_that_fractions_call_misrounded",),
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "no_gradient_is_no_fault", "gradients", "lora_fx/checks/certification.py",
        "        _refuse_lost(model, inputs, adapters, undo)\n", "        pass\n",
        "A model whose autograd function takes the weight gives right outputs, and its adapter never trains.",
        tests=(f"{GRADIENTS}::test_who_wants_a_plain_tensor_gets_the_sum_and_theta_its_gradient",),
    ),
    Mutant(
        "checkpoint_seen_by_halves", "gradients", "lora_fx/checks/gradients.py",
        "if not isinstance(error.__cause__, CheckpointError):", "if error.__cause__:",
        "A model whose checkpoint takes another way while it is looked at is refused.",
        tests=("tests/test_gradients.py::test_a_checkpoint_that_runs_again_in_backward_finds_what_it_found_before",),
    ),
    Mutant(
        "lost_where_there_is_none", "gradients", "lora_fx/checks/gradients.py",
        "if adapter in apart & wanted)", "if adapter in apart)",
        "A weight that the model itself does not train is refused.",
        tests=(f"{GRADIENTS}::test_what_has_no_gradient_in_the_model_itself_is_not_lost",),
    ),
    Mutant(
        "lost_is_certified", "gradients", "lora_fx/checks/certification.py",
        "return right and not self.gradient_lost", "return right",
        "A certificate is true of a model that does not train.",
        tests=(f"{GRADIENTS}::test_a_model_whose_gradient_is_lost_is_not_certified",),
    ),
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "offloaded_unchecked", "places", "lora_fx/checks/verification.py",
        "    total = weight.to(torch.float64) + delta(weight, *storage.adapters)\n    if step",
        "    total = weight.to(torch.float64)\n    if step",
        "The check of an offloaded model holds it against the plain weights.",
    ),
    Mutant(
        "real_part_alone", "places", "lora_fx/checks/verification.py",
        "torch.view_as_real(tensor.resolve_conj()) if", "tensor.real if",
        "Two models that differ in the imaginary part of an output are called one function.",
    ),
    Mutant(
        "branch_of_another_is_a_use", "verification", "lora_fx/checks/flow.py",
        "        return found if own.isdisjoint(found) else frozenset()", "        return frozenset()",
        "The branch of a weight that multiplies another adapted weight counts as one more use of that.",
        tests=("tests/test_certificate.py::test_the_branch_of_another_weight_is_no_use_of_this_one",),
    ),
    Mutant(
        "casts_unseen", "verification", "lora_fx/checks/verification.py",
        "        if rounding.step <= stored:\n            return stored\n", "        return stored\n",
        "The noise of a model that multiplies in a narrower dtype than its weights' is measured as of theirs.",
        tests=("tests/test_mutant_gaps.py::test_a_weight_is_rounded_as_it_is_multiplied_with",),
    ),
    Mutant(
        "zeros_are_proof", "verification", "lora_fx/checks/uses.py",
        "own if row.problem == _NOTHING and not own.problem else row",
        'replace(own, problem="") if row.problem == _NOTHING else row',
        "A use that multiplies zeros is certified without a measurement that shows it right.",
        tests=("tests/test_certificate.py::test_a_use_of_zeros_whose_branch_is_lost_is_not_certified",),
    ),
    # ── memory, before anything runs ─────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "weights_are_activations", "memory", "lora_fx/checks/footprint.py",
        "        if storage_of(tensor) not in own:", "        if True:",
        "A weight that autograd keeps is counted twice: as a weight, and as an activation.",
        tests=(f"{MEMORY}::test_it_is_what_is_measured", f"{MEMORY}::test_gpt3_holds_what_the_paper_says_with_adapters",
               f"{MEMORY}::test_only_what_is_kept_is_counted"),
    ),
    Mutant(
        "adapters_are_weights", "memory", "lora_fx/checks/footprint.py",
        "for key, t in everything.items() if key not in adapters)", "for key, t in everything.items())",
        "Adapters are counted among the model's own weights too.",
    ),
    Mutant(
        "optimizer_has_no_state", "memory", "lora_fx/checks/footprint.py",
        "        made.step()\n", "",
        "The state of an optimizer is seen before its first step, when there is none.",
    ),
    Mutant(
        "training_sees_the_trace", "memory", "lora_fx/checks/footprint.py",
        "        with _untraced():\n", "        with nullcontext():\n",
        "transformers sees a trace, and keeps a mask and repeated keys that training has not.",
    ),
    Mutant(
        "memory_in_eval_mode", "memory", "lora_fx/checks/footprint.py",
        "        model.train()\n        yield", "        model.eval()\n        yield",
        "Masks of dropout are not counted.",
    ),
    Mutant(
        "memory_in_the_models_dtype", "memory", "lora_fx/checks/footprint.py",
        "return dtype if dtype is not None and", "return dtype if False and",
        "The dtype that is asked for is not taken.",
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "tokens_are_checked_without_one", "rewrites", "lora_fx/checks/rewritten.py",
        'flat[given] = _mixed(flat[given], adapters[0].layout.size("i"), min(counts))',
        "pass",
        "The self-check never looks a new token up.",
        tests=of_rewrite_checks("what_cannot_be_told_apart_is_checked_as_a_whole"),
    ),
    Mutant(
        "check_rewrites_nothing", "rewrites", "lora_fx/checks/rewritten.py",
        "use = partial(rewritten, adapter, use)",
        "pass",
        "A model is held against the one without its rewrites.",
        tests=of_rewrite_checks("what_cannot_be_told_apart_is_checked_as_a_whole"),
    ),
    Mutant(
        "nothing_behind_blocks_is_checked", "rewrites", "lora_fx/checks/rewritten.py",
        "                for tensor, block in blocks_of(adapter, here.modules).items():",
        "                for tensor, block in ():",
        "The model is held against one whose blocks give what they gave.",
        tests=of_rewrites("a_certificate_has_a_row_for_each_use"),
    ),
    Mutant(
        "short_memory_is_no_train_mode", "rewrites", "lora_fx/checks/rewritten.py",
        "if not training or isinstance(error.__cause__, torch.OutOfMemoryError | MemoryError):",
        "if not training:",
        "Where memory is short in train mode, the check says that the model has none, and lets the adapter pass.",
        tests=of_rewrites("memory_that_is_short_in_train_mode_is_no_mode_that_the_model_lacks"),
    ),
    Mutant(
        "rewrites_unchecked_by_themselves", "rewrites", "lora_fx/checks/certification.py",
        "if isinstance(checked, Checked) and checked.apart:", "if False:",
        "Only the whole model is looked at, where rounding in bfloat16 hides a small fault.",
        tests=of_rewrite_checks("apply_sees_a_small_fault_of_a_rewrite_in_bfloat16"),
    ),
    Mutant(
        "some_new_ids_are_looked_up", "rewrites", "lora_fx/checks/regions.py",
        "new = torch.arange(words, words + count, device=like.device)",
        "new = torch.arange(words, words + min(count, 2), device=like.device)",
        "Of many new tokens the first two are looked up by the check.",
        tests=of_rewrite_checks("apply_sees_a_small_fault_of_a_rewrite_in_bfloat16"),
    ),
    Mutant(
        "blocks_as_they_stand", "rewrites", "lora_fx/checks/rewritten.py",
        'return next((f"block_{k}" for k, path in counted if path in paths), otherwise)', "return otherwise",
        "Which θ belongs behind a block is asked of the block itself.",
        tests=of_rewrite_checks("apply_sees_blocks_in_another_order"),
    ),
    Mutant(
        "regions_compute_with_anything", "rewrites", "lora_fx/checks/alignment.py",
        "set(map(seen, own.all_input_nodes)) - self.adapted.pure <= known", "True",
        "What stands behind a block is taken for a part of the use that follows.",
        tests=of_prefixes("a_block_that_a_graph_calls_stays_a_call"),
    ),
    Mutant(
        "regions_read_any_theta", "rewrites", "lora_fx/checks/alignment.py",
        "self._theta(own) <= theta", "self._theta(own) is not None",
        "A rewrite is taken for a part of the next use.",
        tests=of_rewrite_checks("of_two_rewrites_behind_each_other_each_is_seen"),
    ),
    Mutant(
        "casts_to_the_same_are_steps", "rewrites", "lora_fx/checks/alignment.py",
        "(value.dtype, value.device, value.shape, value.stride()) !=", "None !=",
        "Where ids are cast to what they are, the programs are not found to be one.",
        tests=of_rewrite_checks("what_is_right_is_seen_to_be_in_float64"),
    ),
    Mutant(
        "deltas_left_out_of_a_rewritten_use", "rewrites", "lora_fx/checks/regions.py",
        "return not self.sums and self.aligned.same(self.reading.node, self.use)",
        "return self.aligned.same(self.reading.node, self.use)",
        "A rewrite around a weight with deltas is held against that of the plain weight.",
        tests=of_rewrites("it_stands_around_the_deltas_and_a_later_one_around_an_earlier_one"),
    ),
    Mutant(
        "tables_are_widened", "rewrites", "lora_fx/checks/regions.py",
        "        wide = not self.as_stored\n", "        wide = True\n",
        "A table as large as a vocabulary is looked up as a float64 copy.",
        tests=of_rewrite_checks("a_table_is_looked_up_as_it_is"),
    ),
    Mutant(
        "ids_are_gone", "rewrites", "lora_fx/checks/regions.py",
        "[node for node in freed if node not in kept]", "freed",
        "What a table was read with is freed before the blocks behind which something stands run.",
        tests=of_rewrite_checks("what_is_right_is_seen_to_be_in_float64"),
    ),
    Mutant(
        "norm_of_the_definition", "rewrites", "lora_fx/checks/definitions.py",
        "_EPSILON = 1e-5", "_EPSILON = 1e-6",
        "The check has another ε than torch's LayerNorm.",
        tests=of_rewrite_checks("what_is_right_is_seen_to_be_in_float64"),
    ),
    Mutant(
        "what_is_unlike_passes", "rewrites", "lora_fx/checks/rewritten.py",
        "report, rows = _by_replay(model, flow, places, given, adapted)",
        "report, rows = compare_all(adapted, adapted, adapted), ()",
        "Where the programs are not one, nothing is looked at.",
        tests=of_rewrite_checks("what_cannot_be_told_apart_is_checked_as_a_whole"),
    ),
    Mutant(
        "new_ids_for_every_stack", "rewrites", "lora_fx/checks/rewritten.py",
        "return adapter.kind.behind is None or inside", "return True",
        "The check gives new tokens to a stack behind whose blocks nothing stands.",
        tests=of_prefixes("each_stack_of_an_encoder_decoder_has_the_ids_of_its_own_calls"),
    ),
)  # fmt: skip
