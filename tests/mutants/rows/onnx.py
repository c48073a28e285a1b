"""Defects of `export/onnx`."""

from __future__ import annotations

from tests.mutants.table import Mutant, of_kinds

ROWS = (
    # ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "exported_without_the_fold", "export", "export/onnx/weights.py",
        "        if not self.adapters:\n", "        if self.dtype:\n",
        "The file holds the base weights.",
        tests=("tests/test_onnx.py::test_float16_is_run",),
    ),
    Mutant(
        "any_file_passes", "export", "export/onnx/runs.py",
        "        if not comparison.equivalent:\n", "        if comparison is None:\n",
        "Whatever ONNX Runtime computes, the file is written.",
        tests=("tests/test_onnx.py::test_a_wrong_weight_in_the_file_is_caught",
               "tests/test_onnx.py::test_a_wrong_integer_is_caught"),
    ),
    Mutant(
        "any_row_is_padding", "export", "export/onnx/padding.py",
        "            if not bool((rows & ~padding", "            if not bool((rows & padding[:0].any() & ~padding",
        "Rows that the mask does not call padding may come of attention to nothing.",
        tests=("tests/test_onnx_padding.py::test_padding_that_reaches_other_rows_is_refused",),
    ),
    Mutant(
        "the_dead_are_asked", "export", "export/onnx/processes.py",
        "if one.program is program and one.alive:", "if one.program is program:",
        "Once ONNX Runtime has crashed, no export of the process is checked any more.",
        tests=("tests/test_onnx_processes.py::test_it_is_started_once_and_again_where_it_has_ended",),
    ),
    Mutant(
        "hang_waited_for", "export", "export/onnx/processes.py",
        "        clock.start()\n", "        clock.start()\n        clock.cancel()\n",
        "A graph on which the inference of shapes does not end is waited for.",
        tests=("tests/test_onnx_processes.py::test_what_a_graph_of_somebody_else_does_to_its_reader_is_an_error[hang]",),
    ),
    Mutant(
        "reader_without_bounds", "export", "export/onnx/processes.py",
        '"memory": _ROOM + 8 * len(graph)}', '"memory": 2**50 + 8 * len(graph)}',
        "A graph may take all memory while its shapes are inferred.",
        tests=("tests/test_onnx_processes.py::test_what_a_graph_of_somebody_else_does_to_its_reader_is_an_error[memory]",),
    ),
    Mutant(
        "graph_read_here", "export", "export/onnx/loading.py",
        "        if not has_interpreter():", "        if has_interpreter():",
        "What crashes on somebody else's graph is the user's process.",
        tests=("tests/test_onnx_processes.py::test_shapes_are_read_elsewhere",),
    ),
    Mutant(
        "other_shapes_not_run", "export", "export/onnx/runs.py",
        "    if not sizes:\n        return []", "    if sizes is not None:\n        return []",
        "A file with dynamic axes is only run at the size it was traced with.",
        tests=("tests/test_onnx.py::test_nested_keyword_inputs_and_integer_outputs",),
    ),
    Mutant(
        "optimizer_sees_the_weights", "export", "export/onnx/optimization.py",
        'if value.metadata_props.get(_KIND) != "PARAMETER":', 'if value.metadata_props.get(_KIND) != "BUFFER":',
        "The graph depends on the numbers: zero biases are dropped, equal weights merged.",
        tests=("tests/test_onnx.py::test_zeros_ones_and_equal_weights_leave_the_graph_alone",),
    ),
    Mutant(
        "proof_without_the_numbers", "export", "export/onnx/proof.py",
        "    if wrong:\n", "    if wrong < 0:\n",
        "A proof looks at the graph, and at no folded element.",
        tests=("tests/test_onnx_proof.py::test_one_element_one_bit_off_is_found",),
    ),
    Mutant(
        "proof_without_the_graph", "export", "export/onnx/proof.py",
        "        if mine != theirs:", "        if not (mine and theirs):",
        "A proof takes any graph for the base's.",
        tests=("tests/test_onnx_proof.py::test_another_graph_is_found",),
    ),
    Mutant(
        "any_trace_is_of_the_base", "export", "export/onnx/export.py",
        "            if same and adapted & made.blind.read <= made.blind.empty:\n",
        "            if adapted & made.blind.read <= made.blind.empty:\n",
        "A file with branches in it is held against itself, and proven.",
        tests=("tests/test_onnx_proof.py::test_branches_that_were_traced_are_found",),
    ),
    Mutant(
        "proof_of_what_numbers_have_made", "export", "export/onnx/export.py",
        "            if same and adapted & made.blind.read <= made.blind.empty:\n", "            if same:\n",
        "A graph that was optimized with a look at the folded numbers is held against itself, and proven.",
        tests=("tests/test_onnx_proof.py::test_a_graph_that_was_made_for_the_folded_numbers_is_found",),
    ),
    Mutant(
        "proof_holds_every_page", "export", "export/onnx/proof.py",
        "            actual.release()\n", "            pass\n",
        "In the end of a proof the whole file is in memory.",
        tests=("tests/test_onnx_proof.py::test_a_proof_maps_one_weight_after_another",),
    ),
    Mutant(
        "lengths_of_one_byte", "export", "export/onnx/files.py",
        "    while size >> 7:\n", "    while False:\n",
        "A file whose graph has more than 127 bytes cannot be written.",
        tests=("tests/test_onnx.py::test_float16_is_run",),
    ),
    Mutant(
        "nothing_is_checked", "export", "export/onnx/files.py",
        "        checked(path)\n", "        str(path)\n",
        "A file that is no ONNX is written, where ONNX Runtime does not run it.",
        tests=("tests/test_onnx.py::test_refusals_name_the_value_and_the_remedy_and_write_nothing",),
    ),
    Mutant(
        "quantised_weight_not_turned", "export", "export/onnx/quantization.py",
        "as_torch(weight.const_value).t().contiguous()", "as_torch(weight.const_value).contiguous()",
        "A Gemm that is taken apart multiplies by W where it was Wᵀ.",
        tests=("tests/test_onnx_quantization.py::test_numbers_that_fit_come_out_as_they_are_and_slots_stay_in_float",),
    ),
    Mutant(
        "slot_without_the_scale", "export", "export/onnx/switchable.py",
        "delta.whole * delta.scale", "delta.whole",
        "The files of switchable adapters lose the scale.",
        tests=("tests/test_sessions.py::test_each_adapter_is_torchs_in_plain_bound_and_asynchronous_runs",),
    ),
    Mutant(
        "every_slot_has_a_rank", "export", "export/onnx/switchable.py",
        "least = 0 if all(map(_may_be_empty, factors)) else 1", "least = 1",
        "Empty slots of plain matmuls are multiplied with, too.",
        tests=("tests/test_sessions.py::test_an_empty_slot_has_the_least_rank_that_the_runtime_survives",),
    ),
    Mutant(
        "cache_by_its_old_name_alone", "export", "export/onnx/calls.py",
        'return "cache" if theirs and', 'return "cache" if False and',
        "The decoders of transformers 5.24 are refused: they have no past_key_values.",
        tests=("tests/test_runtimes.py::test_a_model_that_calls_its_cache_by_another_name_gives_the_same_file",),
    ),
    Mutant(
        "cache_axes_of_other_names", "export", "export/onnx/targets.py",
        'TOKENS: {0: "batch_size",', 'TOKENS: {0: "batch",',
        "transformers.js makes a first cache for a batch of 0.",
        tests=("tests/test_runtimes.py::test_a_folder_says_the_tokens_of_torch_from_an_empty_cache_with_padding",),
    ),
    Mutant(
        "required_slots_have_defaults", "export", "export/onnx/switchable.py",
        "            if kind == OPTIONAL:\n", "            if kind:\n",
        "Runtimes in JavaScript give the base model for every adapter, without a word.",
        tests=("tests/test_runtimes.py::test_the_runtime_itself_asks_for_what_is_required",),
    ),
    Mutant(
        "tensors_of_any_digest", "export", "export/onnx/portable.py",
        "if said[_DIGEST] != found:", "if not found:",
        "An adapter with flipped bits is loaded.",
        tests=("tests/test_runtimes.py::test_damaged_and_foreign_files_of_tensors_are_refused",),
    ),
    Mutant(
        "zero_bias_of_two_axes", "export", "export/onnx/graphs.py",
        "custom_translation_table=_translations(opset),", "custom_translation_table=None,",
        "A conv3d without a bias is given one that the runtime refuses.",
        tests=("tests/test_onnx.py::test_a_convolution_without_a_bias_is_given_none",),
    ),
    Mutant(
        "quantised_slots", "export", "export/onnx/quantization.py",
        "    for name in slots:\n        model.graph.initializers.pop(name).const_value = None\n", "",
        "The defaults of a switchable graph's A and B are quantised as weights.",
        tests=("tests/test_onnx_quantization.py",),
    ),
    Mutant(
        "quantised_graph_of_the_float_one", "export", "export/onnx/quantization.py",
        "GRAPH: graph_digest(model)}", "}",
        "A quantised file is taken for the graph that it was made from.",
        tests=("tests/test_onnx_quantization.py",),
    ),
    Mutant(
        "damaged_graph_opens", "export", "export/onnx/loading.py",
        "    if (wanted if given is None else given) == found:\n", "    if wanted or given:\n",
        "A file that has some digest is taken for whole: a doubled weight is run.",
        tests=("tests/test_hostile_files.py::test_a_flipped_bit_is_refused",),
    ),
    Mutant(
        "external_data_of_anywhere", "export", "export/onnx/loading.py",
        "        if odd or name.is_absolute() or \"..\" in name.parts:\n", "        if odd:\n",
        "Numbers of a file come from a folder above its own.",
        tests=("tests/test_hostile_files.py::test_external_data_is_in_the_files_folder_and_inside_of_its_file",),
    ),
    Mutant(
        "damaged_task_runs", "export", "export/onnx/tasks.py",
        "            damaged = said.get(SEAL) != tensors_digest(of, raw)\n", "            damaged = SEAL not in said\n",
        "A task's weights with a flipped bit are run.",
        tests=("tests/test_hostile_files.py::test_a_flipped_bit_is_refused",),
    ),
    Mutant(
        "overlapping_adapters_run", "export", "export/onnx/sessions.py",
        "            if twice:\n", "            if not names:\n",
        "Of two adapters on one weight a session takes the last.",
        tests=("tests/test_sessions.py::test_what_the_runtime_would_do_in_silence_is_refused",),
    ),
    Mutant(
        "adapter_of_any_base", "export", "export/onnx/sessions.py",
        'if version != base:', 'if version < 0:',
        "A session runs an adapter that was trained on other base weights.",
        tests=("tests/test_sessions.py::test_a_model_whose_base_changed_saves_no_adapter_for_the_graph",),
    ),
    Mutant(
        "onnx_branch_without_its_scale", "export", "export/onnx/folding.py",
        "LowRank(layout, A, B, branch.scale / base.scale, rank)", "LowRank(layout, A, B, 1.0, rank)",
        "A file's branches are folded without their scale.",
        tests=("tests/test_onnx_folding.py::test_our_unfolded_file_folds_to_the_folded_file",),
    ),
    Mutant(
        "onnx_branch_of_another_input", "export", "export/onnx/branches.py",
        "        if self._source(base.x, by_rows) is not self._source(down.x, by_rows):", "        if base.x is None:",
        "Two narrow layers of another input are folded into the layer that they are added to.",
        tests=("tests/test_onnx_folding.py::test_what_is_not_a_branch_is_not_folded",),
    ),
    Mutant(
        "onnx_product_read_elsewhere", "export", "export/onnx/branches.py",
        "return len(readers) > 1 or value.is_graph_output()", "return not readers and not value.is_graph_output()",
        "What reads a product before its branches are added reads the folded one.",
        tests=("tests/test_onnx_folding.py::test_a_product_that_is_read_without_its_branch_stays_beside_the_folded_one",),
    ),
    Mutant(
        "onnx_partial_sum_keeps_its_branch", "export", "export/onnx/branches.py",
        "            if self._shared(term.rest):\n                return\n", "",
        "A sum of some of the branches that something else reads keeps them.",
        tests=("tests/test_onnx_folding.py::test_a_partial_sum_that_is_read_is_folded_too",),
    ),
    Mutant(
        "onnx_sequence_inferred_as_tensor", "export", "export/onnx/graphs.py",
        "    if False in admitted.values():\n", "    if not admitted:\n",
        "A folded file says of a sequence that it is a tensor, and does not load.",
        tests=("tests/test_onnx_folding.py::test_a_sequence_in_the_graph_stays_one",),
    ),
    Mutant(
        "onnx_bottleneck_folded_unasked", "export", "export/onnx/branches.py",
        'or ("asked for by unnamed=True" if self.unnamed else "")', 'or "asked for by unnamed=True"',
        "A bottleneck that the model has itself is folded as an adapter.",
        tests=("tests/test_onnx_folding.py::test_a_bottleneck_of_the_models_own_is_folded_only_when_asked",),
    ),
    Mutant(
        "any_folded_file_passes", "export", "export/onnx/equality.py",
        "        if not comparison.equivalent:\n", "        if comparison is None:\n",
        "The folded file is run, and whatever it computes is taken.",
        tests=("tests/test_onnx_folding.py::test_a_wrong_fold_is_not_written",),
    ),
    Mutant(
        "checkpoint_shape_unchecked", "export", "export/onnx/weights.py",
        "        if shape != tuple(tensor.shape):", "        if len(shape) > 9:",
        "A weight of another shape goes from a checkpoint into the file.",
        tests=("tests/test_onnx_forms.py::test_checkpoints_that_do_not_fit_are_refused",),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "onnx_without_dense_kinds", "kinds", "export/onnx/weights.py",
        "return rounded_sum(loaded, self.adapters, self.dtype, self.name)", "return loaded.to(self.dtype)",
        "A folded file holds the base weight where a kind has no factors.",
        tests=of_kinds("a_folded_file_of_every_kind_is_proven"),
    ),
    Mutant(
        "dense_kind_in_a_switchable_file", "kinds", "export/onnx/switchable.py",
        "        if not place.adapter.kind.low_rank:\n", "        if not place.weight:\n",
        "A switchable graph of a kind without factors is begun, and fails somewhere.",
        tests=of_kinds("a_switchable_file_wants_factors"),
    ),
    Mutant(
        "settings_not_in_the_digest", "kinds", "export/onnx/weights.py",
        "else [adapter.kind.name, dict(adapter.settings)]", "else adapter.kind.name",
        "DoRAs with other scales are one and the same to a folded file.",
        tests=of_kinds("a_file_knows_the_settings_of_a_dense_kind"),
    ),
)  # fmt: skip
