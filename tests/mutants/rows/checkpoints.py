"""Defects of `export/checkpoints`."""

from __future__ import annotations

from tests.mutants.table import BESIDE, CHECKPOINTS, EXPERTS, Mutant

ROWS = (
    # ── checkpoints on disk ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "strength_is_dropped", "checkpoints", "export/checkpoints/entries.py",
        "        share.adapter.adjust(given.strength)\n", "",
        "An adapter of strength 0.5 is folded whole.",
        tests=(f"{CHECKPOINTS}::test_strengths_multiply_deltas_and_several_adapters_add_up",),
    ),
    Mutant(
        "first_features_of_dora", "checkpoints", "export/checkpoints/arithmetic.py",
        "value.narrow(axis, inside[0], size)", "value.narrow(axis, 0, size)",
        "Every block of rows gets the sizes of the first.",
        tests=(f"{CHECKPOINTS}::test_it_is_the_fold_of_the_model",),
    ),
    Mutant(
        "one_expert_for_all", "checkpoints", "export/checkpoints/arithmetic.py",
        "delta.picked(torch.tensor(n))", "delta.picked(torch.tensor(0))",
        "Every expert gets the adapter of the first.",
        tests=(f"{CHECKPOINTS}::test_experts_are_matrices_of_their_own",),
    ),
    Mutant(
        "said_besides_is_not_kept", "checkpoints", "export/checkpoints/entries.py",
        'said.get("config", {})', "{}",
        "The alpha that was said of a file without one is gone when the checkpoint is unfolded.",
        tests=(f"{CHECKPOINTS}::test_another_dialect_is_the_same_adapter",),
    ),
    Mutant(
        "what_was_written_is_trusted", "checkpoints", "export/checkpoints/streams.py",
        "if found != (was.target, was.beside_digest):", "if False:",
        "A file that a kill has left is gone on with, whatever is in it.",
        tests=(f"{CHECKPOINTS}::test_what_was_finished_is_verified_before_it_is_trusted",),
    ),
    Mutant(
        "another_base_is_gone_on_with", "checkpoints", "export/checkpoints/streams.py",
        "if self.read_digest.hexdigest() != was.source:", "if False:",
        "A base that has changed is gone on with.",
        tests=(f"{CHECKPOINTS}::test_another_task_or_another_base_does_not_go_on_with_it",),
    ),
    Mutant(
        "base_stays_in_the_cache", "checkpoints", "export/checkpoints/streams.py",
        "_forget(self.source, self.forgotten, segment.start)", "pass",
        "A base that is read once pushes out of the system's cache what others have there.",
        tests=(f"{CHECKPOINTS}::test_what_is_read_and_written_goes_out_of_the_systems_cache",),
    ),
    Mutant(
        "not_on_the_disk", "checkpoints", "export/checkpoints/streams.py",
        "os.fdatasync(self.target.fileno())", "pass",
        "What was written waits in memory, however much it is.",
        tests=(f"{CHECKPOINTS}::test_what_is_read_and_written_goes_out_of_the_systems_cache",),
    ),
    Mutant(
        "late_errors_are_lost", "checkpoints", "export/checkpoints/streams.py",
        "            flush.result()\n", "            pass\n",
        "A disk that fails after the last block was written is not heard.",
        tests=(f"{CHECKPOINTS}::test_a_disk_that_fails_late_is_an_error",),
    ),
    Mutant(
        "a_torn_line_counts", "checkpoints", "export/checkpoints/work.py",
        ".split(b\"\\n\")[:-1]  # what", ".split(b\"\\n\")  # what",
        "A line of the journal that a kill has cut short is read.",
        tests=(f"{CHECKPOINTS}::test_what_was_finished_is_verified_before_it_is_trusted",),
    ),
    Mutant(
        "another_task_goes_on", "checkpoints", "export/checkpoints/work.py",
        "elif first != self.task:", "elif False:",
        "A fold goes on with what another fold had begun.",
        tests=(f"{CHECKPOINTS}::test_another_task_or_another_base_does_not_go_on_with_it",),
    ),
    Mutant(
        "two_processes_at_once", "checkpoints", "export/checkpoints/work.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        "Two processes write the same folder.",
        tests=(f"{CHECKPOINTS}::test_two_at_once_is_one_too_many",),
    ),
    Mutant(
        "a_full_folder_is_written_over", "checkpoints", "export/checkpoints/work.py",
        "    if out.exists() or out.is_symlink():", "    if False:",
        "A folder with files in it is replaced.",
        tests=(f"{CHECKPOINTS}::test_a_folder_that_is_not_empty_is_not_written_to",),
    ),
    Mutant(
        "an_index_is_believed", "checkpoints", "export/checkpoints/checkpoint.py",
        "if where != table.get(name):", "if False:",
        "An index may say that a tensor is where it is not.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "an_index_leaves_its_folder", "checkpoints", "export/checkpoints/checkpoint.py",
        "if Path(name).name != name or name in", "if False and name in",
        "An index may name any file of the system.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "weights_a_second_time", "checkpoints", "export/checkpoints/checkpoint.py",
        "if any(fnmatch.fnmatch(name, pattern) for pattern in _COPIES):", "if False:",
        "The base's weights are copied beside the folded ones, for a loader to take.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "a_truncated_shard", "checkpoints", "export/checkpoints/checkpoint.py",
        "    if end != size:", "    if end < size:",
        "A shard may end before its tensors do.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "a_tied_weight_is_folded", "checkpoints", "export/checkpoints/shares.py",
        "if twice or (vocabulary and tied is not False and len(names) < 2):", "if twice:",
        "An adapter of the embedding changes the head that is tied to it.",
        tests=(f"{BESIDE}::test_a_weight_that_may_be_tied_is_refused",),
    ),
    Mutant(
        "the_config_decides_on_squares", "checkpoints", "export/checkpoints/entries.py",
        "            if said != flag:", "            if False:",
        "A square matrix is folded as the config says, which knows only the last layer.",
        tests=(f"{CHECKPOINTS}::test_a_square_matrix_lies_as_its_neighbours_of_that_name",),
    ),
    Mutant(
        "convolutions_are_plain", "checkpoints", "export/checkpoints/entries.py",
        "if set(shape[2:]) != {1} and folder.header is None:", "if False:",
        "A dilated convolution is folded as a plain one.",
        tests=(f"{CHECKPOINTS}::test_an_adapter_that_does_not_fit_is_refused",),
    ),
    Mutant(
        "a_half_entry_is_dropped", "checkpoints", "export/checkpoints/entries.py",
        "if lost := sorted({*folder.tensors} - used):", "if lost := []:",
        "What fits nowhere in an adapter's file is dropped in silence.",
        tests=(f"{CHECKPOINTS}::test_an_adapter_that_does_not_fit_is_refused",),
    ),
    Mutant(
        "a_bias_tells_the_other_axis", "checkpoints", "export/checkpoints/orientation.py",
        "None if rows == columns else columns", "None if rows == columns else rows",
        "A bias is as long as there are input features.",
        tests=(f"{CHECKPOINTS}::test_a_square_matrix_lies_as_its_neighbours_of_that_name",),
    ),
    Mutant(
        "what_is_new_is_not_seen", "checkpoints", "export/checkpoints/manifest.py",
        '"is new": new}', '"is new": []}',
        "A file that somebody has put into a folded checkpoint is not named.",
        tests=(f"{CHECKPOINTS}::test_every_file_that_changes_is_named",),
    ),
    Mutant(
        "any_base_comes_back", "checkpoints", "export/checkpoints/fold.py",
        "if end.target != manifest.files[name].base:", "if False:",
        "What an unfold has written need not be the base.",
        tests=(f"{CHECKPOINTS}::test_nothing_is_unfolded_but_what_was_written",),
    ),
    Mutant(
        "conv1d_is_extracted_as_linear", "checkpoints", "export/checkpoints/extract.py",
        "flags = {pair.new: bool(orientation.transposed(pair.new)) for", "flags = {pair.new: False for",
        "The factors of a weight that lies (in, out) are in each other's place.",
        tests=(f"{CHECKPOINTS}::test_what_was_folded_is_extracted",),
    ),
    Mutant(
        "a_bias_of_the_branch_is_not_scaled", "checkpoints", "export/checkpoints/beside.py",
        "checkpoint.tensors[own].shape, made[0].scale)", "checkpoint.tensors[own].shape, 1.0)",
        "The bias of lora_B is added without the scale of its branch.",
        tests=(f"{BESIDE}::test_what_stands_beside_the_factors_is_folded_as_in_the_model",),
    ),
    Mutant(
        "rows_in_the_order_of_the_config", "checkpoints", "export/checkpoints/beside.py",
        "sorted(rows), value[order], place", "sorted(rows), value, place",
        "Trained rows go to each other's tokens where the config names them in another order.",
        tests=(f"{BESIDE}::test_what_stands_beside_the_factors_is_folded_as_in_the_model",),
    ),
    Mutant(
        "two_tables_for_one_tie", "checkpoints", "export/checkpoints/shares.py",
        "    if tied and alike:", "    if False:",
        "Rows of a tied embedding are folded, and a second copy of it, which the head may read, is not.",
        tests=(f"{BESIDE}::test_rows_of_which_too_little_is_known_are_refused",),
    ),
    Mutant(
        "the_whole_table_for_a_few_rows", "checkpoints", "export/checkpoints/arithmetic.py",
        "    if any(share.adapter.rows is None for share in shares):", "    if True:",
        "For two rows the whole table is added to, and kept.",
        tests=(f"{BESIDE}::test_rows_have_strengths_and_cost_no_more_than_they_are",),
    ),
    Mutant(
        "resized_rows_are_looked_for_in_the_folded", "checkpoints", "export/checkpoints/entries.py",
        'said.get("resized", {})', "None",
        "An unfold asks the folded table which of its rows are the base's.",
        tests=(f"{BESIDE}::test_what_stands_beside_the_factors_is_folded_as_in_the_model",),
    ),
    Mutant(
        "heads_alike_in_name", "checkpoints", "export/checkpoints/beside.py",
        "not torch.equal(table.T, matrix)", "False",
        "A head's own factors are taken for those of the embedding that it is tied to.",
        tests=(f"{BESIDE}::test_a_tied_head_with_factors_of_its_own_is_refused",),
    ),
    Mutant(
        "every_module_has_the_parameter", "checkpoints", "export/checkpoints/entries.py",
        "if end or is_held(name, checkpoint)]", "]",
        "target_parameters without a module in its name takes every layer that is adapted.",
        tests=(f"{BESIDE}::test_a_parameter_without_a_module_in_its_name_is_of_the_modules_that_have_it",),
    ),
    Mutant(
        "sizes_of_each_layer_alone", "checkpoints", "export/checkpoints/entries.py",
        "sizes.ranks[target]", "peft_format.ranks(folder, [target])[target]",
        "A process is started for each layer that a pattern of ranks is asked about.",
        tests=("tests/test_hostile_files.py::test_all_patterns_of_a_file_share_one_budget",),
    ),
    Mutant(
        "experts_in_the_order_of_their_names", "checkpoints", "export/checkpoints/loaded.py",
        "sorted(checkpoint.tensors, key=_natural)", "sorted(checkpoint.tensors)",
        "Of more than ten experts the tenth takes what was trained for the second.",
        tests=(f"{EXPERTS}::test_experts_are_folded_where_they_lie",),
    ),
    Mutant(
        "the_second_part_is_the_first", "checkpoints", "export/checkpoints/loaded.py",
        "        at = stop\n", "        at = at\n",
        "The up projection of an expert takes the rows of its gate.",
        tests=(f"{EXPERTS}::test_parts_are_what_the_whole_is_there",),
    ),
    Mutant(
        "parts_along_the_inputs_are_rows", "checkpoints", "export/checkpoints/loaded.py",
        'if layout.sides == "boi":', "if True:",
        "Matrices that lie side by side along what A reads are cut along what B makes.",
        tests=(f"{EXPERTS}::test_parts_are_what_the_whole_is_there",),
    ),
    Mutant(
        "unlike_tensors_are_stacked", "checkpoints", "export/checkpoints/loaded.py",
        "if any(len(own) != experts or len({(t.shape, t.dtype) for t in own}) != 1 for own in each):", "if False:",
        "Experts one of which is missing, or has another shape, are taken for a whole.",
        tests=(f"{EXPERTS}::test_what_is_not_merged_so_is_refused",),
    ),
    Mutant(
        "square_experts_as_the_config_says", "checkpoints", "export/checkpoints/entries.py",
        "if tensors[path] in loaded.parts:", "if False:",
        "A merged gate and up that is square is refused, for no file says how it lies.",
        tests=(f"{EXPERTS}::test_experts_are_folded_where_they_lie",),
    ),
    Mutant(
        "resized_rows_by_names_on_disk", "checkpoints", "export/checkpoints/entries.py",
        "loaded.by_its_names(given.resized)", "given.resized",
        "The way back of a table with another name in the model leaves its last rows as they were folded.",
        tests=(f"{EXPERTS}::test_more_rows_of_a_table_under_another_name",),
    ),
)  # fmt: skip
