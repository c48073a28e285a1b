"""Defects of `lora_fx/deltas`: adapters and the adapted weight."""

from __future__ import annotations

from tests.mutants.table import GAPS, HISTORIES, Mutant, of_kinds, of_prefixes, of_principal, of_rewrites

ROWS = (
    # ── the algebra: factors, scale, forms ───────────────────────────────────────────────────────────────────────────
    Mutant(
        "factors_swapped", "algebra", "lora_fx/deltas/adapted_weight.py",
        "        A, B = self._factors(delta, placement)\n        if",
        "        B, A = (factor.mT for factor in self._factors(delta, placement))\n        if",
        "The branch contracts x with B and makes the output with A; only square weights take it.",
    ),
    Mutant(
        "scale_dropped", "algebra", "lora_fx/deltas/adapted_weight.py",
        "delta.scaled(z), B)", "z, B)",
        "The branch is x·A·B, without its scale.",
    ),
    Mutant(
        "dense_without_scale", "algebra", "lora_fx/deltas/adapted_weight.py",
        "own = branch.delta.of(self.root)", 'own = branch.delta.of(self.root) / getattr(branch.delta, "scale", 1)',
        "Only ops that take the weight whole (LSTM, bilinear) lose the scale.",
        zoo="native-bilinear,native-lstm",
    ),
    Mutant(
        "second_adapter_lost", "algebra", "lora_fx/deltas/adapted_weight.py",
        "for branch, placement in beside:", "for branch, placement in beside[:1]:",
        "Of two adapters on one weight only the first acts.",
        tests=(GAPS,),
    ),
    Mutant(
        "second_scheduled_adapter_lost", "algebra", "lora_fx/deltas/adapted_weight.py",
        "for branch, placement in placed:", "for branch, placement in placed[:1]:",
        "Of two adapters on one matrix only the first acts.",
        tests=(GAPS,),
    ),
    Mutant(
        "scheduled_dropout_missing", "algebra", "lora_fx/deltas/adapted_weight.py",
        "None if drop is None else drop(call.x)", "None",
        "Dropout of the branch never acts in a matmul that is scheduled.",
        tests=(GAPS,),
    ),
    Mutant(
        "stale_input", "algebra", "lora_fx/deltas/adapted_weight.py",
        "        x = call.x\n",
        "        x = call.x\n"
        "        if isinstance(x, fx.Proxy) and getattr(x.node.target, '__name__', '') == 'add':\n"
        "            x = fx.Proxy(x.node.args[0], x.tracer)\n",
        "The branch of the second of two chained matmuls reads what the first one gave before its own branch.",
        tests=(GAPS,),
    ),
    Mutant(
        "dropout_in_eval", "algebra", "lora_fx/deltas/adapted_weight.py",
        "            x = drop(x)", "            x = F.dropout(x, branch.adapter.dropout.p)",
        "Dropout of the branch acts in eval mode too.",
    ),
    Mutant(
        "dropout_missing_in_train", "algebra", "lora_fx/deltas/adapted_weight.py",
        "            x = drop(x)", "            pass",
        "Dropout of the branch never acts: training overfits, and no output in eval mode tells.",
        tests=(GAPS,),
    ),
    Mutant(
        "dropout_missing_on_embeddings", "algebra", "lora_fx/deltas/adapted_weight.py",
        "z = z * drop(torch.ones_like(z[..., :1]))", "pass",
        "Dropout of the branch never acts where the weight is looked up.",
        tests=(GAPS,),
    ),
    Mutant(
        "dropout_on_the_output", "algebra", "lora_fx/deltas/adapted_weight.py",
        "            x = drop(x)", "            x = drop(torch.ones_like(x[..., :1])) * x",
        "Whole tokens are dropped from the branch input instead of single features.",
        tests=(GAPS,),
    ),
    Mutant(
        "rows_shifted", "algebra", "lora_fx/deltas/low_rank.py",
        "F.pad(self.B, (0, 0, self.rows[0], out - self.rows[-1] - 1))",
        "F.pad(self.B, (0, 0, self.rows[0] + 1, out - self.rows[-1] - 2))",
        "A part of a fused weight acts one row further down.",
        zoo="native-chain",
        tests=(GAPS,),
    ),
    Mutant(
        "scattered_rows_in_a_block", "algebra", "lora_fx/deltas/low_rank.py",
        "return zeros.index_copy(len(self.layout.batch), index, self.B)",
        "return F.pad(self.B, (0, 0, self.rows[0], out - self.rows[0] - len(self.rows)))",
        "Rows that are no contiguous range (q, k, v interleaved by head) are taken for one that starts at the first.",
    ),
    Mutant(
        "experts_swap_b", "algebra", "lora_fx/deltas/low_rank.py",
        "self.whole[experts]", "self.whole[experts.flip(0) if experts.ndim else experts]",
        "Experts that are picked by an index tensor get each other's B.",
        zoo="olmoe-batched",
    ),
    Mutant(
        "wrong_form_registered", "algebra", "lora_fx/deltas/registration.py",
        "            off <= bound,\n", "            True,\n",
        "A form from outside is taken whatever its branch computes.",
        tests=("tests/test_open_forms.py",),
    ),
    Mutant(
        "form_fires_where_it_must_not", "algebra", "lora_fx/deltas/registration.py",
        "self.require(not self.calls, ", "self.require(True, ",
        "A form from outside is taken though it fires on its own counter-example.",
        tests=("tests/test_open_forms.py",),
    ),
    # ── tracing and wiring ───────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "adapters_not_trainable", "insert", "lora_fx/deltas/adapter.py",
        "nn.Parameter(numbers, requires_grad=tensor not in self.kind.frozen)",
        "nn.Parameter(numbers, requires_grad=False)",
        "Nothing trains.",
    ),
    Mutant(
        "deactivated_adapter_trains", "wiring", "lora_fx/deltas/adapter.py",
        "own[name].requires_grad_(whether)", "pass",
        "activate() leaves the adapters trainable that do not act, and frozen the ones that do.",
        tests=(GAPS,),
    ),
    # ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "second_adapter_lost_at_once", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "    for adapter in adapters:\n        term", "    for adapter in adapters[:1]:\n        term",
        "Of two adapters on a weight that is read by dispatch only the first acts.",
    ),
    Mutant(
        "view_forgotten_at_once", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "if weight.chain or adapter.layout.sides != sides:", "if adapter.layout.sides != sides:",
        "A slice of a weight is adapted as if it were the whole.",
    ),
    Mutant(
        "bias_of_the_first_call", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "stands = [object() for _ in values]", "stands = [None if v is None else object() for v in values]",
        "Whether a linear adds its bias is what it did when one like it was first called.",
    ),
    Mutant(
        "row_of_the_table_kept", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "if FORMS.get(name) is not form or type(x) not in ORDINARY:", "if type(x) not in ORDINARY:",
        "A form that is taken out of the table goes on deciding.",
    ),
    # ── adapted weights with deltas of other kinds ───────────────────────────────────────────────────────────────────
    Mutant(
        "dense_kind_lost_beside_a_branch", "kinds", "lora_fx/deltas/adapted_weight.py",
        "plain = weight.only(inside).dense() if inside else weight.base", "plain = weight.base",
        "Where a low-rank branch stands beside a matmul, what has none is left out.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "deltas_in_sequence", "kinds", "lora_fx/deltas/adapted_weight.py",
        "own = branch.delta.of(self.root)",
        "own = branch.delta.of(self.root if delta is None else self.root + delta)",
        "The second δ is one of W + the first: the order matters.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "bias_in_the_product", "kinds", "lora_fx/deltas/adapted_weight.py",
        'return self.out - (self._shaped(bias) if call.form.name == "conv" else bias if beta == 1 else beta * bias)',
        "return self.out",
        "The branch of DoRA scales the bias along with x·Wᵀ.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "bias_in_the_product_of_a_convolution", "kinds", "lora_fx/deltas/adapted_weight.py",
        'self._shaped(bias) if call.form.name == "conv" else', "self.out * 0 if call.form.name == 'conv' else",
        "The same of convolutions alone.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "beta_in_the_product", "kinds", "lora_fx/deltas/adapted_weight.py",
        "bias if beta == 1 else beta * bias)", "bias)",
        "addmm(b, x, W, beta=2) leaves half of its bias in what DoRA scales.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "features_of_a_part_unplaced", "kinds", "lora_fx/deltas/adapted_weight.py",
        "self.placement.up(None, self.adapter.embedded(values)).squeeze(-1)",
        "self.placement.up(None, self.adapter.embedded(values).roll(8, -2)).squeeze(-1)",
        "A part of a fused weight scales the first features instead of its own.",
        tests=of_kinds("dora_of_one_part_beside_its_matmul"),
    ),
    Mutant(
        "dora_alone_with_dropout", "kinds", "lora_fx/deltas/adapted_weight.py",
        "or dropped or not whole", "or not whole",
        "Dropout of DoRA never acts in a linear.",
        tests=of_kinds("dropout_of_dora_acts_on_its_branch_input_in_train_mode"),
    ),
    Mutant(
        "dora_alone_on_a_part", "kinds", "lora_fx/deltas/adapted_weight.py",
        "placement.is_whole and branch.adapter.rows is None and not self.cast", "placement.is_whole and not self.cast",
        "A part of a fused weight is taken for all of it.",
        tests=of_kinds("dora_of_one_part_beside_its_matmul"),
    ),
    Mutant(
        "dora_alone_on_a_slice", "kinds", "lora_fx/deltas/adapted_weight.py",
        "placement.is_whole and branch.adapter.rows is None", "branch.adapter.rows is None",
        "A linear with a view of the weight is given the whole of it.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_base_not_dropped", "kinds", "lora_fx/deltas/adapted_weight.py",
        "call, out = replace(call, x=drop(call.x)), None", "call = replace(call, x=drop(call.x))",
        "With dropout DoRA scales what W makes of the whole input.",
        tests=of_kinds("dropout_of_dora_acts_on_its_branch_input_in_train_mode"),
    ),
    Mutant(
        "dora_not_dropped_on_embeddings", "kinds", "lora_fx/deltas/adapted_weight.py",
        "return own * drop(torch.ones_like(own[..., :1])) if drop is not None and call.form.looks_up else own",
        "return own",
        "Dropout of DoRA never acts where the weight is looked up.",
        tests=of_kinds("dropout_of_dora_on_an_embedding_takes_whole_tokens"),
    ),
    Mutant(
        "dora_with_groups", "kinds", "lora_fx/deltas/adapted_weight.py",
        "plain and usual and not placement.swapped", "plain and not placement.swapped",
        "The branch of DoRA takes convolutions with groups, and addmm with alpha, whose x·Wᵀ it makes without these.",
        tests=of_kinds("two_kinds_add_up_in_every_use"),
    ),
    Mutant(
        "dora_branch_of_the_input", "kinds", "lora_fx/deltas/adapted_weight.py",
        "usual and not placement.swapped", "usual",
        "A weight read transposed, with in and out changed over, has a size for each input feature.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "detached_weight_learns", "kinds", "lora_fx/deltas/adapter.py",
        "Dense(self.layout, lambda weight: self.of(weight).detach(), None)", "self",
        "W.detach() of a model has a gradient, of kinds without factors.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "part_of_another_place", "kinds", "lora_fx/deltas/adapter.py",
        "matrix.narrow(-2, first, len(self.rows))", "matrix.narrow(-2, 0, len(self.rows))",
        "A part of a fused weight is δ of its first rows, in branch and fold and the checks' δ alike.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "scattered_part_of_another_place", "kinds", "lora_fx/deltas/adapter.py",
        "matrix.index_select(-2, index)", "matrix.index_select(-2, index - index[0])",
        "The same of rows that are no contiguous range.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "part_put_at_the_front", "kinds", "lora_fx/deltas/adapter.py",
        'self.rows, self._buffers.get("index")).whole', "tuple(range(len(self.rows)))).whole",
        "δ of a part of a fused weight is added to its first rows.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "matrix_in_the_weights_dtype", "kinds", "lora_fx/deltas/adapter.py",
        "return self._part(weight).to(self.dtype if weight.dtype != torch.float64 else weight.dtype)",
        "return self._part(weight)",
        "A kind is given a bfloat16 W beside its float32 θ.",
        tests=of_kinds("every_kind_in_every_dtype"),
    ),
    Mutant(
        "branch_while_recording", "kinds", "lora_fx/deltas/adapted_weight.py",
        "branch.delta.theta is None or recording.on or torch", "branch.delta.theta is None or torch",
        "A captured program has branches of a kind whose δ no check can follow.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "computed_factors_rounded", "kinds", "lora_fx/deltas/adapter.py",
        "wide = {name: p.detach().to(torch.float64)", "wide = {name: p.detach()",
        "Factors that a kind computes are rounded to float32 before they are folded.",
        tests=of_kinds("a_low_rank_kind_from_outside_has_branches_schedules_and_the_exact_fold"),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "scale_baked_by_a_pickle", "settings", "lora_fx/deltas/adapter.py",
        "if is_fx_symbolic_tracing():", "if False:",
        "A GraphModule out of a pickle goes on with the scale that it was pickled with.",
    ),
    Mutant(
        "dropout_set_in_vain", "settings", "lora_fx/deltas/adapter.py",
        "        if value != 0:", "        if False:",
        "A dropout that no forward calls can be set, and nothing is dropped.",
    ),
    Mutant(
        "activated_all_of_it_trains", "settings", "lora_fx/deltas/adapter.py",
        "names = self._trained if whether else", "names = tuple(self._parameters) if whether else",
        "A frozen A trains after the adapter was deactivated and activated.",
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "rewrite_of_the_plain_use", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "plain = weight.only(deltas) if deltas else weight.base",
        "plain, deltas = weight.base, []",
        "The deltas of a weight are lost where something rewrites its use.",
        tests=of_rewrites("it_stands_around_the_deltas_and_a_later_one_around_an_earlier_one"),
    ),
    Mutant(
        "only_the_last_rewrite", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "use = partial(_around, own, use, theta)",
        "first = partial(_around, own, use, theta)\n    use = first",
        "Of several rewrites of one use the last alone is done.",
        tests=of_rewrites("it_stands_around_the_deltas_and_a_later_one_around_an_earlier_one"),
    ),
    Mutant(
        "rewrite_left_out_of_an_unknown_use", "rewrites", "lora_fx/deltas/adapted_weight.py",
        'raise _no_use(branch, "reads it in another way than a product does whose features come last")',
        "continue",
        "A use that no plan has seen goes on without its rewrite.",
        tests=of_rewrites("a_use_that_no_plan_has_seen_is_refused_when_it_runs"),
    ),
    Mutant(
        "rewrite_in_the_dtype_of_theta", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "theta = own.cast(weight.base.dtype).theta if weight.cast else own.theta",
        "theta = own.theta",
        "Beside a weight in bfloat16 a rewrite computes with float32.",
        tests=of_rewrites("beside_a_weight_in_bfloat16_its_theta_is_float32_and_its_result_is_not"),
    ),
    Mutant(
        "rewrite_of_channels", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "if call.out_dims != (-1,):",
        "if False:",
        "A bottleneck behind a convolution narrows positions.",
        tests=of_rewrites("what_has_no_such_use_is_refused_by_name"),
    ),
    Mutant(
        "shared_trains_in_its_owner_alone", "rewrites", "lora_fx/deltas/adapter.py",
        "        return shared\n", "        return shared.detach()\n",
        "What adapters have in common gets its gradient from one of them.",
        tests=(f"{HISTORIES}::test_a_history_of_what_adapters_have_in_common",),
    ),
    Mutant(
        "shared_starts_again", "rewrites", "lora_fx/deltas/adapter.py",
        "for name in self._owners:  # it has started",
        "for name in ():",
        "A later site draws what all have trained anew.",
        tests=of_rewrites("what_a_compacter_shares_has_one_owner"),
    ),
    Mutant(
        "starts_train_too", "kinds", "lora_fx/deltas/adapter.py",
        "requires_grad=tensor not in self.kind.frozen", "requires_grad=True",
        "What a kind says is frozen trains.",
        tests=of_principal("pissa_starts_at_the_nearest_of_its_rank"),
    ),
    Mutant(
        "new_ids_hidden_from_tokens", "rewrites", "lora_fx/deltas/adapted_weight.py",
        '    for branch in sorted(around, key=_is_outer):',
        '    for branch in around:',
        "Trained tokens that were applied first never see their own ids.",
        tests=of_prefixes("tokens_beside_it_train_what_the_first_block_gets"),
    ),
    # ── strengths, and room for ranks ────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "strength_ignored", "settings", "lora_fx/deltas/adapter.py",
        "        multiplier = strength\n", "        multiplier = 1.0\n",
        "Whatever strength an adapter is activated at, it acts as it was trained.",
        tests=("tests/test_strengths.py::test_it_is_the_dense_sum_in_forwards_folds_and_certificates",),
    ),
    Mutant(
        "strength_in_the_program", "settings", "lora_fx/deltas/adapter.py",
        "return self._live[0]\n", "return self._multiplier\n",
        "torch.compile compiles anew for another strength, or another alpha.",
        tests=("tests/test_strengths.py::test_another_strength_is_no_other_program",),
    ),
    Mutant(
        "live_number_stays", "settings", "lora_fx/deltas/adapter.py",
        "_multiplier=multiplier, _live=live)", "_multiplier=multiplier, _live=self.__dict__.get('_live', live))",
        "What is compiled goes on with the strength that an adapter began with.",
        tests=("tests/test_strengths.py::test_another_strength_is_no_other_program",),
    ),
    Mutant(
        "branch_of_a_kind_at_full_strength", "kinds", "lora_fx/deltas/adapted_weight.py",
        "own = times(adapter.multiplier, adapter.kind.branch(product, adapter.matrix(self.root), delta.theta))", 
        "own = adapter.kind.branch(product, adapter.matrix(self.root), delta.theta)",
        "DoRA beside other adapters acts whole, at whatever strength.",
        tests=("tests/test_strengths.py::test_it_is_the_dense_sum_in_forwards_folds_and_certificates",),
    ),
    Mutant(
        "whole_matmul_at_full_strength", "kinds", "lora_fx/deltas/adapted_weight.py",
        "torch.compiler.is_compiling() or branch.adapter.strength != 1", "torch.compiler.is_compiling()",
        "DoRA alone on a weight acts whole, at whatever strength.",
        tests=("tests/test_strengths.py::test_one_alone_is_the_dense_sum",),
    ),
    Mutant(
        "strength_of_no_delta", "settings", "lora_fx/deltas/adapter.py",
        "if strength != 1 and not self.kind.is_delta:", "if False:",
        "A bottleneck at strength 0.5 acts whole, without a word.",
        tests=("tests/test_strengths.py::test_what_is_no_delta_has_no_strength",),
    ),
    Mutant(
        "old_numbers_behind_a_lower_rank", "files", "lora_fx/deltas/adapter.py",
        "                parameter.zero_()\n", "                pass\n",
        "An adapter of rank 1 in the place of one of rank 4 has the old one's other ranks.",
        tests=("tests/test_replace.py::test_a_lower_rank_is_filled_with_zeros_and_saved_without_them",),
    ),
    Mutant(
        "numbers_in_the_room_are_not_saved", "files", "lora_fx/deltas/adapter.py",
        "            if bool(rest.any()):\n", "            if False:\n",
        "A file leaves out ranks that have been written to.",
        tests=("tests/test_replace.py::test_numbers_in_the_room_are_not_left_out_of_a_file",),
    ),
    Mutant(
        "settings_in_the_program", "settings", "lora_fx/deltas/adapter.py",
        "if self.kind.factors is own_factors:  # without", "if False:  # without",
        "Where a weight dispatches, another alpha or rank in place compiles anew.",
        tests=("tests/test_replace.py::test_replaced_nothing_is_compiled_anew",),
    ),
    Mutant(
        "same_child_refused", "algebra", "lora_fx/deltas/adapter.py",
        "            if name in self._modules and self._modules[name] is value:\n", "            if False:\n",
        "A wrapper that puts each child back cannot walk over an adapter.",
        tests=("tests/test_places.py::test_a_walk_that_puts_each_child_back_leaves_an_adapter_as_it_is",),
    ),
    Mutant(
        "shared_factor_sharded", "algebra", "lora_fx/deltas/adapter.py",
        "        if not is_dynamo_compiling() and is_shard(shared)", "        if False and is_shard(shared)",
        "What another block has sharded is mixed with plain tensors: torch's raw error.",
        tests=("tests/test_places.py::test_shared_factors_that_another_block_has_sharded_are_refused_by_name",),
    ),
)  # fmt: skip
