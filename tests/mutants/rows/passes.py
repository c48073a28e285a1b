"""Defects of `passes`."""

from __future__ import annotations

from tests.mutants.table import (
    EXTRACT,
    GAPS,
    GRADIENTS,
    Mutant,
    of_combine,
    of_extract,
    of_kinds,
    of_prefixes,
    of_rewrites,
)

ROWS = (
    # ── tracing and wiring ───────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "tied_owner_not_registered", "insert", "passes/insert.py",
        "for n, (path, attribute) in enumerate(row.owners):", "for n, (path, attribute) in enumerate(row.owners[:1]):",
        "A tied weight is adapted under its first name only; the self-check takes that for a split.",
        tests=("tests/test_laws.py::test_every_name_of_a_tied_weight_is_adapted", "tests/test_rules.py", GAPS),
    ),
    Mutant(
        "use_skipped", "insert", "passes/insert.py",
        "for use in row.weight.uses:", "for use in row.weight.uses[:1]:",
        "A weight that several modules read is rewritten in the first of them.",
        zoo="native-shared-parameter,native-tied",
        tests=(GAPS,),
    ),
    Mutant(
        "site_skipped", "insert", "passes/insert.py",
        "_insert(model, row, plan.name, owners) for row in plan.rows)",
        "_insert(model, row, plan.name, owners) for row in plan.rows[:-1] or plan.rows)",
        "The last site of a plan with several gets no adapter.",
    ),
    Mutant(
        "factors_in_the_weights_dtype", "insert", "passes/insert.py",
        "dtype=parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32", "dtype=parameter.dtype",
        "The factors of a bfloat16 model are bfloat16: small updates vanish.",
        tests=("tests/test_adapter_files.py::test_dtypes", GAPS),
    ),
    Mutant(
        "adapter_starts_in_eval", "insert", "passes/insert.py",
        "adapter.train(owner.training)", "adapter.eval()",
        "apply on a model in train mode: dropout waits for the next model.train().",
        tests=(GAPS,),
    ),
    Mutant(
        "decisions_baked_in", "wiring", "passes/purity.py",
        "if step.opname not in _INSTRUCTIONS:", "if False:",
        "A forward that tests for None, sets attributes or opens a `with` block is rewritten as what it did once.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "changes_in_place_taken_for_new_values", "wiring", "passes/purity.py",
        'if step.opname == "BINARY_OP" and step.argrepr.endswith("="):', "if False:",
        "`x += 1` in a forward leaves the caller's x as it was.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "closures_set_once", "wiring", "passes/purity.py",
        'if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:', "if False:",
        "A forward that sets a variable of the function around it does so once, in the trace.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "dunders_read_once", "wiring", "passes/purity.py",
        'if name.startswith("__")]', "if not name]",
        "`self.__dict__[...]` in a forward is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "globals_baked_in", "wiring", "passes/purity.py",
        "if not _may_be_named(value, path):", "if False:",
        "Globals, os, random and numpy in a forward are frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "globals_of_any_type", "wiring", "passes/purity.py",
        "        return _is_known(value)\n    if isinstance(value, type):",
        "        return True\n    if isinstance(value, type):",
        "Whatever C function a forward names is taken for one without state: random.random, torch.is_grad_enabled.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "values_above_methods", "wiring", "passes/purity.py",
        "if value is super and (found := _beside_methods(frame)):", "if False:",
        "What `super()` gives in a forward is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "mutable_defaults", "wiring", "passes/purity.py",
        '(not vars(function) or function.__module__.startswith("torch")) and all(map(_is_immutable, defaults))',
        "True",
        "A list as a default of a function is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "mode_baked_in", "wiring", "passes/purity.py",
        'if name == "training":', "if False:",
        "A forward that tests for train mode is rewritten as in the other one.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "containers_baked_in", "wiring", "passes/purity.py",
        "if module is not self.root or not _is_immutable(own[name]):", "if module is not self.root:",
        "Numbers in a dict, a list or a config of the module are frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attributes_of_children_baked_in", "wiring", "passes/purity.py",
        "if module is not self.root or not _is_immutable(own[name]):", "if not _is_immutable(own[name]):",
        "Numbers of a child are frozen: nobody notices when they are set.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "class_attributes_baked_in", "wiring", "passes/purity.py",
        "if module is not self.root or not isinstance(function, types.FunctionType) or not _is_plain(function):",
        "if found is None:",
        "Class attributes and properties are frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "foreign_functions_run_once", "wiring", "passes/purity.py",
        "if code not in _torch_code() and not code.co_filename.startswith((*_OWN, _FX)):", "if False:",
        "What a function of the standard library gave in the trace is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attributes_not_noticed", "wiring", "passes/purity.py",
        "            self.read.add(name)\n            return own[name]", "            return own[name]",
        "A number of the module's own that is set after apply has no effect.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "methods_not_noticed", "wiring", "passes/purity.py",
        "        self.read.add(name)\n        return object", "        return object",
        "A method that is replaced on the instance after apply has no effect.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "factories_run_once", "wiring", "passes/rewriting.py",
        "if symbolic or not self", "if True or not self",
        "`torch.zeros(…)` and `torch.rand(…)` in a forward are one tensor for all calls.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "unused_calls_dropped", "wiring", "passes/rewriting.py",
        'is_impure_node=lambda n: n.op != "get_attr"', "is_impure_node=lambda n: False",
        "Draws and changes in place whose result nobody reads are left out.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "absent_bias_inlined", "wiring", "passes/rewriting.py",
        "if not (traced.baked or traced.absent):", "if not traced.baked:",
        "A Linear inside a GraphModule that gets a bias after apply goes on without.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "kept_class_never_given", "switching", "passes/keeping.py",
        "if one.key == key and self._holds(module, one):", "if False:",
        "Each switch traces every module anew.",
    ),
    Mutant(
        "kept_class_for_others", "switching", "passes/keeping.py",
        "one.key == key and ", "",
        "A module gets the class that reads a weight with an adapter that does not act.",
    ),
    Mutant(
        "kept_class_of_old_values", "switching", "passes/keeping.py",
        "all(_same(self._value(owners[path], name), was) for path, name, was in kept.read)", "True",
        "An attribute that was set while no adapter acted has its old value in the forward.",
    ),
    Mutant(
        "kept_class_of_old_code", "switching", "passes/keeping.py",
        "and _are(_content(code.base), code.content)", "",
        "A method that was replaced while no adapter acted runs on in the forward.",
    ),
    Mutant(
        "kept_classes_of_removed_adapters", "switching", "passes/activate.py",
        "forget_classes(here.modules)", "pass",
        "What was generated for adapters that are gone stays in memory.",
    ),
    Mutant(
        "inlined_keywords_lost", "wiring", "passes/rewriting.py",
        "next(placeholders, kwargs.get(node.target, default))", "next(placeholders, default)",
        "A GraphModule's call of an adapted leaf by keyword gets the default instead.",
        tests=(GAPS,),
    ),
    # ── passes and pipelines ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "requires_unchecked", "passes", "passes/base.py",
        "for condition in self.requires:", "for condition in ():",
        "A pass runs where what it requires does not hold.",
    ),
    Mutant(
        "ensures_unchecked", "passes", "passes/base.py",
        "for condition in self.ensures:", "for condition in ():",
        "A pass that does not do what it promises goes unnoticed.",
    ),
    Mutant(
        "missing_facts_accepted", "passes", "passes/pipeline.py",
        "if c.fact is not None and c.fact not in known]", "if False]",
        "A pipeline without what a pass needs is refused in the middle of its run, not when it is made.",
    ),
    Mutant(
        "two_passes_of_one_name", "passes", "passes/pipeline.py",
        "if one.name in self.names[:k]:", "if False:",
        "Which of two passes people insert before is anyone's guess.",
    ),
    Mutant(
        "after_is_before", "passes", "passes/pipeline.py",
        "self._with(self._place(name) + 1, passes)", "self._with(self._place(name), passes)",
        "A pass inserted after another one runs before it.",
    ),
    Mutant(
        "pipeline_half_done", "passes", "passes/pipeline.py",
        ", changing(model, self.name) as undo, ExitStack() as inside:",
        ", ExitStack() as inside:\n            undo: list = []",
        "A refusal in the middle leaves what the passes before it have done.",
    ),
    Mutant(
        "dump_of_the_start", "passes", "passes/pipeline.py",
        "                    before = after\n", "                    pass\n",
        "The dump shows each pass what all passes before it have changed.",
    ),
    Mutant(
        "removal_without_a_name", "passes", "passes/activate.py",
        "        if not self.names:", "        if False:",
        "remove(model) does nothing, without a word.",
    ),
    # ── fold ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fold_into_both_uses", "fold", "passes/fold.py",
        "storage.replace(nn.Parameter(sums[k].weight.clone(), storage.parameter.requires_grad))", "pass",
        "An adapter on the head is folded into the tied embedding too.",
        tests=("tests/test_rules.py", GAPS),
    ),
    Mutant(
        "fold_keeps_the_keys", "fold", "passes/fold.py",
        "    for child in record.children:\n        marks.detach(module, child)\n", "",
        "A folded model still has the adapters' keys, and its branches on top of the folded weights.",
    ),
    # ── unfold ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "unfold_unties", "unfold", "passes/fold.py",
        "update(record.originals)",
        "update({n: nn.Parameter(p.detach().clone()) for n, p in record.originals.items()})",
        "A head that was split from its embedding comes back as a copy.",
        tests=("tests/test_rules.py::test_a_split_use_folds_into_a_copy_of_its_own_and_unfolds_to_one_storage",),
    ),
    Mutant(
        "unfold_writes_before_it_looks", "unfold", "passes/fold.py",
        "        if not right:\n", "        if False:\n",
        "Unfolding does not look whether a weight was written to since.",
    ),
    # ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "parts_merged", "plan", "passes/planning.py",
        "own = (site.rows, site.role) if rule.role is not None and site.rows is not None else None", "own = None",
        "Query and value of a fused weight share one adapter instead of having one each.",
        tests=("tests/test_rules.py::test_a_role_picks_the_rows_of_a_fused_weight_and_a_name_the_whole",),
    ),
    Mutant(
        "other_use_adapted_too", "plan", "passes/planning.py",
        "others = [u for u in weight.uses if u not in uses and _reads_rows(u, rows)]", "others: list[Use] = []",
        "A rule for the head adapts the embedding it is tied to.",
        tests=("tests/test_rules.py::test_a_name_adapts_every_use_of_a_tied_weight_and_a_role_only_its_own",),
    ),
    Mutant(
        "adapted_twice_under_one_name", "plan", "passes/planning.py",
        "same = attribute_of(child) == attribute and adapter.name == name", "same = False",
        "A second apply replaces a trained adapter of the same name.",
        tests=("tests/test_refusals.py",),
    ),
    # ── verification ─────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "self_check_off", "verification", "passes/insert.py",
        "if program.capture is None:", "if program is not None:",
        "apply does not check itself.",
    ),
    # ── checks of other kinds ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "first_refusal_alone", "sites", "passes/planning.py",
        "raise PlanError.of(refusals)", "raise refusals[0]",
        "Each call names one of the weights that cannot be adapted.",
        tests=("tests/test_refusals.py::test_all_that_cannot_be_adapted_is_in_one_message",),
    ),
    Mutant(
        "skipped_by_any_rule", "sites", "passes/planning.py",
        "if rule.otherwise != SKIP or rule not in left]", "if rule not in left]",
        "A rule that must refuse leaves out what it cannot adapt.",
        tests=("tests/test_refusals.py::test_leaving_out_holds_for_the_rule_that_says_so",),
    ),
    Mutant(
        "second_use_of_a_bias_forgotten", "kinds", "passes/planning.py",
        "uses = (*found[key].uses, *row.uses) if key in found else row.uses", "uses = row.uses",
        "A bias of two weights is adapted for the last of them.",
        tests=of_kinds("a_bias_that_others_read_too_is_refused"),
    ),
    Mutant(
        "bias_that_others_read", "kinds", "passes/planning.py",
        "    if others:\n        raise PlanError(\n            f\"{row.rule.label} adapts {len(row.uses)}",
        "    if not row:\n        raise PlanError(\n            f\"{row.rule.label} adapts {len(row.uses)}",
        "A rule for one layer shifts the bias of another along with it.",
        tests=of_kinds("a_bias_that_others_read_too_is_refused"),
    ),
    Mutant(
        "part_of_another_bias", "kinds", "passes/planning.py",
        "if row.rows is not None and bias.parameter.numel() != features:", "if False:",
        "A part of a fused weight adapts elements that its bias does not have.",
        tests=of_kinds("a_part_of_a_weight_whose_bias_is_one_number_has_none_of_its_own"),
    ),
    # ── files of other kinds ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "magnitude_kept_at_its_start", "kinds", "passes/insert.py",
        "adapter.put(stored)\n", "adapter.put(dict([*stored.items()][:2]))\n",
        "Of a saved DoRA the factors are loaded, and the magnitude is 0.",
        tests=of_kinds("saved_and_loaded_it_is_the_same_adapter"),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "dropout_where_no_branch_stands", "kinds", "passes/planning.py",
        " or not (row.kind.low_rank or _has_product(u, row.kind))]", "]",
        "Dropout of DoRA is planned on a convolution with groups, and found out when the model trains.",
        tests=of_kinds("dropout_needs_a_branch_of_the_kind"),
    ),
    Mutant(
        "plan_counts_like_lora", "kinds", "passes/planning.py",
        "        shapes = self.kind.shapes(self.space).items()\n        return",
        "        shapes = [*self.kind.shapes(self.space).items()][:2]\n        return",
        "The plan leaves the magnitudes out.",
        tests=of_kinds("the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds"),
    ),
    Mutant(
        "scale_baked_into_forwards", "settings", "passes/rewriting.py",
        'scale = self.attribute(f"{path}.multiplier")', "scale = adapter.multiplier",
        "A generated forward goes on with the scale that the adapter had when it was made.",
    ),
    Mutant(
        "refused_switch_half_done", "settings", "passes/activate.py",
        "facts.undo += Acting.of(adapter).restore, partial(adapter.change, **adapter.told)  # it may", "pass  # it may",
        "After a refused switch, other adapters are active than before.",
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "dropout_without_a_branch", "gradients", "passes/insert.py",
        "and not a.drops and a.kind.is_delta for a in alike", "and a.kind.is_delta for a in alike",
        "A weight that is read as the sum W + δ has a dropout, and the first training step raises.",
        tests=(f"{GRADIENTS}::test_a_dropout_has_no_branch_there_and_is_refused",),
    ),
    Mutant(
        "broken_kind_is_served_dense", "gradients", "passes/insert.py",
        "isinstance(error, NotServed) and alike", "alike",
        "A kind whose branch is wrong is read as the sum, and nobody hears of it.",
        tests=("tests/test_kinds.py::test_the_self_check_moves_theta_of_every_kind",),
    ),
    Mutant(
        "all_are_read_as_the_sum", "gradients", "passes/insert.py",
        "if kinds & set(map(_held, s.owners)) for a", "for a",
        "One autograd function, and no weight of the model is adapted by a branch.",
        tests=(f"{GRADIENTS}::test_only_they_are_read_so",),
    ),
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "pruning_changes_the_scale", "kinds", "passes/prune.py",
        "alpha=adapter.scale * divisor)", "alpha=adapter.alpha)",
        "A pruned adapter divides its alpha by fewer ranks.",
        tests=("tests/test_budget.py::test_pruned_ranks_leave_the_forward_the_file_and_the_fold",),
    ),
    Mutant(
        "flags_of_a_block_stay", "switching", "passes/activate.py",
        "            parameter.requires_grad_(flag)\n", "            pass\n",
        "What a block has frozen or thawed stays so after it.",
        tests=("tests/test_active.py::test_what_was_frozen_or_thawed_inside_is_as_it_was",),
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "rewrite_before_the_bias", "rewrites", "passes/planning.py",
        'if bias is not None and use.call.options.get("bias") is None:',
        "if False:",
        "A bias that is added by an op of its own comes behind the bottleneck.",
        tests=of_rewrites("what_has_no_such_use_is_refused_by_name"),
    ),
    Mutant(
        "rewritten_and_read_besides", "rewrites", "passes/planning.py",
        "if use not in row.uses and not (row.split and use.module not in here):",
        "if False:",
        "Who reads the weight besides is told so when it runs.",
        tests=of_rewrites("what_has_no_such_use_is_refused_by_name"),
    ),
    Mutant(
        "rewrite_is_served_dense", "rewrites", "passes/insert.py",
        " and a.kind.is_delta for a in alike", " for a in alike",
        "What rewrites a use is asked to be a sum, and the error names that.",
        tests=of_rewrites("code_that_wants_a_plain_tensor_is_told_that_no_product_was_seen"),
    ),
    Mutant(
        "shared_is_counted_at_each_site", "rewrites", "passes/planning.py",
        " - sum(sum(own.values()) for own in common) + sum(once.values())",
        "",
        "What adapters have in common is counted for each.",
        tests=of_rewrites("each_system_trains_by_rules_alone_and_exactly_its_own"),
    ),
    Mutant(
        "nothing_is_shared", "rewrites", "passes/insert.py",
        "        if owner is not adapter:\n            adapter.share(tensor, owner)\n",
        "",
        "Each compacter has factors of its own.",
        tests=of_rewrites("what_a_compacter_shares_has_one_owner"),
    ),
    Mutant(
        "shared_with_those_of_one_call", "rewrites", "passes/insert.py",
        "        if adapter.name == name:\n            for tensor in adapter.kind.shared",
        "        if False:\n            for tensor in adapter.kind.shared",
        "Sites that are added later share with each other alone.",
        tests=of_rewrites("what_a_compacter_shares_has_one_owner"),
    ),
    Mutant(
        "rewrite_folds", "rewrites", "passes/fold.py",
        "if not adapter.kind.is_delta:",
        "if False:",
        "A fold leaves out what is no delta.",
        tests=of_rewrites("nothing_that_folds_takes_it"),
    ),
    Mutant(
        "combines_without_scales", "kinds", "passes/combine.py",
        "own = [(w * a.scale, a.fitting().exact())", "own = [(w, a.fitting().exact())",
        "The sum of adapters leaves out what each B·A is multiplied with.",
        tests=of_combine("ranks_add_up_and_a_weight_of_none_takes_nothing"),
    ),
    Mutant(
        "combines_parts_as_they_come", "kinds", "passes/combine.py",
        "at = {row: n for n, row in enumerate(rows)}", "at = {row: n for n, row in enumerate(reversed(rows))}",
        "The rows of a part are put where another part's are.",
        tests=of_combine("parts_stay_apart_and_meet_where_they_overlap"),
    ),
    Mutant(
        "combined_acts_at_once", "kinds", "passes/combine.py",
        "        adapter.act(False)\n", "",
        "A combined adapter acts beside those that it is made of.",
        tests=of_combine("it_is_there_and_does_nothing_until_it_is_asked"),
    ),
    Mutant(
        "extracts_what_was", "kinds", "passes/extract.py",
        "yield start, stop, wide - one[start:stop]", "yield start, stop, wide + one[start:stop]",
        "What is extracted is not what has changed.",
        tests=of_extract("at_the_rank_of_the_change_it_is_the_tuned_model"),
    ),
    Mutant(
        "extracts_past_buffers", "kinds", "passes/extract.py",
        "if self.beside != IGNORE and buffers:", "if False:",
        "Buffers that differ are left out without a word.",
        tests=(f"{EXTRACT}::test_what_cannot_be_extracted_is_refused",),
    ),
    Mutant(
        "extracts_one_of_two", "kinds", "passes/extract.py",
        "        if not _equal(first, tensors[name]):", "        if False:",
        "Of a weight that is no longer tied the first name is taken.",
        tests=(f"{EXTRACT}::test_what_cannot_be_extracted_is_refused",),
    ),
    Mutant(
        "axes_by_chance", "rewrites", "passes/blocks.py",
        '        if len(set(ids.shape)) < ids.ndim:',
        '        if False:',
        "Ids of as many rows as columns: nobody knows whether a block gives them the other way round.",
        tests=of_prefixes("axes_that_cannot_be_told_apart_are_refused"),
    ),
    Mutant(
        "two_readings_planned", "rewrites", "passes/blocks.py",
        '        if mixed:',
        '        if False:',
        "The plan takes a block whose positions are of either of two readings.",
        tests=of_prefixes("two_readings_before_a_block_are_refused"),
    ),
    Mutant(
        "behind_some_of_its_blocks", "rewrites", "passes/wiring.py",
        '            if missing or not any(',
        '            if False and not any(',
        "A block was exchanged, and the adapter goes on behind the others.",
        tests=of_prefixes("copies_pickles_and_parts"),
    ),
    Mutant(
        "inlined_with_what_is_around_it", "rewrites", "passes/wiring.py",
        ' or is_wrapped(child)',
        '',
        "A graph takes the forward of a block into itself, and leaves out what stands behind it.",
        tests=of_prefixes("a_block_that_a_graph_calls_stays_a_call"),
    ),
    # ── strengths, names, and what comes to others ───────────────────────────────────────────────────────────────────
    Mutant(
        "strength_of_a_block_stays", "switching", "passes/activate.py",
        "            self.adapter.adjust(self.strength)\n", "            pass\n",
        "After a block the adapters act at its strengths.",
        tests=("tests/test_strengths.py::test_blocks_nest_and_all_is_as_it_was_after_an_error",),
    ),
    Mutant(
        "zero_acts", "switching", "passes/activate.py",
        "adapter.act(strength != 0, strength or 1.0)", "adapter.act(adapter.name in wanted, strength or 1.0)",
        "An adapter at strength 0 acts whole.",
        tests=("tests/test_strengths.py::test_zero_leaves_it_out_and_minus_one_takes_it_away",),
    ),
    Mutant(
        "a_second_one_acts", "insert", "passes/insert.py",
        "if alone if self.active is None else self.active:", "if self.active is not False:",
        "An adapter that is loaded beside others acts at once.",
        tests=("tests/test_replace.py::test_a_second_one_is_inactive_unless_asked",),
    ),
    Mutant(
        "renamed_beside_its_weight_alone", "switching", "passes/activate.py",
        "            adapter.change(name=self.new)\n", "            pass\n",
        "A renamed adapter is found under its old name only.",
        tests=("tests/test_replace.py::test_renamed_it_is_the_same_under_another_name",),
    ),
)  # fmt: skip
