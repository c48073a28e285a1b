"""Defects of `export/adapters`."""

from __future__ import annotations

from tests.mutants.table import GAPS, Mutant, of_kinds, of_prefixes, of_principal, of_rewrites

CONFIGS, PRETRAINED = "tests/test_peft_configs.py", "tests/test_pretrained.py"

ROWS = (
    # ── adapter files ────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "alpha_pattern_ignored", "files", "export/adapters/peft.py",
        'return _values(folder, "alpha_pattern", targets, 8 if alpha is None else alpha)',
        "return dict.fromkeys(targets, 8 if alpha is None else alpha)",
        "A PEFT adapter with a scale for each layer is loaded with one for all.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "rank_pattern_ignored", "files", "export/adapters/peft.py",
        'return _values(folder, "rank_pattern", targets, folder.config.get("r") or 8)',
        'return dict.fromkeys(targets, folder.config.get("r") or 8)',
        "A PEFT adapter with a rank for each layer is read with one for all.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "last_pattern_decides", "files", "export/adapters/peft.py",
        "in reversed([*zip(table.values(), found, strict=True)]):",
        "in [*zip(table.values(), found, strict=True)]:",
        "Of two patterns that match a layer the last decides; PEFT takes the first.",
        tests=(GAPS,),
    ),
    Mutant(
        "square_conv1d_untransposed", "files", "export/adapters/peft.py",
        '{"conv1d": "io",', '{"conv1d": "io" if shape[0] != shape[1] else "oi",',
        "A, B of a square (in, out) weight are read as those of a Linear; no shape tells.",
        tests=("tests/test_adapter_files.py::test_peft_reads_what_we_save",),
    ),
    Mutant(
        "rslora_loaded_as_standard", "files", "export/adapters/peft_files.py",
        '"scaling": "rslora" if config.get("use_rslora") else "standard"', '"scaling": "standard"',
        "use_rslora of a PEFT adapter is ignored.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "out_proj_once", "files", "export/adapters/peft_files.py",
        "float(alphas[layer.target]) * layer.times", "float(alphas[layer.target])",
        "PEFT adds the delta of an attention's out_proj twice, and the loaded model once.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "exclude_ignored", "files", "export/adapters/peft.py",
        'return found - taken("exclude_modules")', "return found",
        "exclude_modules of a PEFT adapter is ignored.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "layers_ignored", "files", "export/adapters/peft.py",
        "found = found & ({*exact} | _in_layers(folder, paths))", "found = found & {*paths}",
        "layers_to_transform of a PEFT adapter is ignored.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "each_pattern_a_budget", "files", "export/adapters/patterns.py",
        "self.left = max(self.left - max(seconds, LEAST), LEAST)", "self.left = self.left",
        "Each pattern of a config may take a second: a file with many takes minutes.",
        tests=("tests/test_hostile_files.py::test_all_patterns_of_a_file_share_one_budget",),
    ),
    Mutant(
        "matched_again", "files", "export/adapters/patterns.py",
        "if key not in self._known:", "if True:",
        "Patterns are matched anew for each question about them.",
        tests=("tests/test_hostile_files.py::test_what_is_left_of_the_budget_is_all_that_a_pattern_gets",),
    ),
    Mutant(
        "any_number_of_plain_patterns", "files", "export/adapters/patterns.py",
        "if plain and len(patterns) * len(names) <= MOST:", "if plain:",
        "A config of many plain names takes minutes in the process of its reader.",
        tests=("tests/test_hostile_files.py::test_very_many_names_are_patterns_that_take_long",),
    ),
    Mutant(
        "target_is_any_ending", "files", "export/adapters/peft.py",
        'any(".".join(words[n:]) in targets for n in range(len(words)))',
        "any(path[n:] in targets for n in range(len(path)))",
        "The target 'lin' takes the module 'mylin' too.",
        tests=(GAPS,),
    ),
    Mutant(
        "options_skipped", "files", "export/adapters/peft.py",
        "if key in known or value is None", "if key in known or key in _REASONS or value is None",
        "Options that change what an adapter computes (a bias of the branch, whole modules) are skipped.",
        tests=("tests/test_adapter_files.py::test_options_that_are_refused",),
    ),
    Mutant(
        "another_base_accepted", "files", "export/adapters/peft.py",
        "or not torch.equal(base.detach().cpu().to(value.dtype), value)", "",
        "A file that carries another base weight is loaded as if it were the model's.",
        tests=("tests/test_adapter_files.py::test_damaged_folders",),
    ),
    Mutant(
        "digest_not_checked", "files", "export/adapters/folder.py",
        "if meta.get(DIGEST) != tensors_digest(meta[HEADER], io.BytesIO(data)):", "if DIGEST not in meta:",
        "Flipped bits in the numbers are loaded.",
        tests=("tests/test_adapter_files.py::test_flipped_bits_and_cut_files",),
    ),
    Mutant(
        "nan_loaded", "files", "export/adapters/folder.py",
        "if not bool(tensor.float().isfinite().all()):", "if False:",
        "A file with NaN is loaded.",
        tests=("tests/test_adapter_files.py::test_damaged_folders",),
    ),
    Mutant(
        "edited_settings_accepted", "files", "export/adapters/own.py",
        "        if config.get(key) != value:", "        if key not in config:",
        "A config that was edited after saving is half believed.",
        tests=("tests/test_adapter_files.py::test_settings_that_were_edited",),
    ),
    Mutant(
        "dropout_not_loaded", "files", "export/adapters/own.py",
        'float(entry["dropout"])', "0.0",
        "The dropout of a saved adapter is gone after loading.",
        tests=("tests/test_adapter_files.py::test_peft_reads_what_we_save",),
    ),
    Mutant(
        "experts_innermost", "files", "export/adapters/peft.py",
        "B.reshape(B.shape[0], rank, -1).permute(2, 0, 1)", "B.reshape(B.shape[0], -1, rank).permute(1, 0, 2)",
        "The experts' factors are read in the order of the rank.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "tied_copy_parted", "files", "export/adapters/beside.py",
        "names = ties if tie and name in ties else (name,)", "names = (name,)",
        "A copy that PEFT ties to the head is read by the embedding alone.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "rows_as_they_are_listed", "files", "export/adapters/beside.py",
        "order = sorted(range(len(rows)), key=rows.__getitem__)", "order = list(range(len(rows)))",
        "Rows of single tokens are taken in the order of the file for tokens in the order of the table.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "bias_of_the_branch_unscaled", "files", "export/adapters/beside.py",
        "(value.double() * scale)", "value.double()",
        "What lora_bias adds is not multiplied with alpha / rank.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "another_embedding_accepted", "files", "export/adapters/beside.py",
        "return rows if rows == last and rows[0] > 0 else None", "return rows",
        "An embedding of another base is taken for one whose vocabulary was resized.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "what_trains_not_written", "files", "export/adapters/files.py",
        "held += trained_of(model, name) if beside == SAVE else []", "held += []",
        "A head that has requires_grad is left out of the file without a word.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "the_last_entry_counts", "files", "export/adapters/spelling.py",
        "if own in tensors and not (", "if False and not (",
        "Of two entries for one weight the last is taken, silently.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "alpha_in_the_file_ignored", "files", "export/adapters/entries.py",
        'key = keys.get("alpha")', "key = None",
        "kohya's alphas are not read: every scale is 1.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "another_part_dropped", "files", "export/adapters/entries.py",
        "if wanted is None and len(known) > 1:", "if False:",
        "Of a file for a UNet and a text encoder one is loaded, and the other dropped without a word.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "groups_side_by_side", "files", "export/adapters/loralib.py",
        "rows = tuple(range(group * width, (group + 1) * width))", "rows = tuple(range(k * width, (k + 1) * width))",
        "The factors of loralib's value group lie on the key's rows.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "sums_of_a_pickle_unread", "files", "export/adapters/pickles.py",
        "(damaged := archive.testzip()) is not None", "(damaged := None) is not None",
        "Flipped bits in the numbers of a pickle are loaded.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "equal_shift_forgotten", "files", "export/adapters/peft_files.py",
        "torch.ldexp(delta.B, torch.tensor(shift))", "delta.B",
        "Parts of a fused weight with scales of their own are saved with one.",
        tests=("tests/test_adapter_files.py::test_peft_reads_what_we_save",),
    ),
    # ── files of other kinds ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "settings_of_a_kind_not_saved", "kinds", "export/adapters/values.py",
        '"kind": a.kind.name, "settings": {**a.settings, **self.here}}',
        '"kind": a.kind.name, "settings": {k: v for k, v in a.settings.items() if k == "rank"}}',
        "The scale of a saved DoRA is 1 after loading.",
        tests=of_kinds("saved_and_loaded_it_is_the_same_adapter"),
    ),
    Mutant(
        "kind_not_saved", "kinds", "export/adapters/values.py",
        'if a.kind.name != "lora":\n            return {**said', "if not a.settings:\n            return {**said",
        "DoRA is saved as LoRA.",
        tests=of_kinds("saved_and_loaded_it_is_the_same_adapter"),
    ),
    Mutant(
        "use_dora_not_said", "kinds", "export/adapters/peft_files.py",
        '"use_dora": dora,', '"use_dora": False,',
        "PEFT is given a DoRA as a LoRA.",
        tests=of_kinds("dora_for_peft_and_back"),
    ),
    Mutant(
        "dora_loaded_as_lora", "kinds", "export/adapters/peft_files.py",
        'kind_named("dora" if config.get("use_dora") else "lora")', 'kind_named("lora")',
        "use_dora of a PEFT adapter is ignored.",
        tests=of_kinds("dora_for_peft_and_back"),
    ),
    Mutant(
        "magnitude_of_a_convolution_flat", "kinds", "export/adapters/peft.py",
        'return (1, out, *[1] * (len(self.layout.shape) - 2)) if self.kind == "conv" else (out,)', "return (out,)",
        "PEFT cannot load the magnitude of a convolution.",
        tests=of_kinds("dora_for_peft_and_back"),
    ),
    Mutant(
        "dora_of_attention_for_peft", "kinds", "export/adapters/peft.py",
        'return "" if known else f"PEFT has no DoRA', 'return "" if self.path is not None else f"PEFT has no DoRA',
        "A DoRA is written for a module that PEFT has none for.",
        tests=of_kinds("dora_of_attention_is_refused_for_peft"),
    ),
    Mutant(
        "part_of_dora_for_peft", "kinds", "export/adapters/peft_files.py",
        'if kind == "dora" and h.adapter.rows is not None:', "if False:",
        "A DoRA of a part of a weight is written as one of all of it.",
        tests=of_kinds("a_part_of_dora_is_refused_for_peft"),
    ),
    Mutant(
        "dora_read_outside_for_peft", "kinds", "export/adapters/peft_files.py",
        'if h.adapter.read_outside and layer.kind != "attention":', "if False:",
        "A DoRA whose weight another module reads is written for PEFT, which adapts calls alone.",
        tests=of_kinds("dora_of_a_weight_that_another_module_reads_is_refused_for_peft"),
    ),
    Mutant(
        "two_kinds_for_peft", "kinds", "export/adapters/peft_files.py",
        "        if len(kinds) > 1:\n", "        if not kinds:\n",
        "A LoRA beside a DoRA is written as one.",
        tests=of_kinds("what_peft_has_no_kind_for_is_refused"),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "branch_outside_of_a_forward", "settings", "export/adapters/peft.py",
        "if owner not in _KNOWN and not", "if False and not",
        "A Linear subclass with a forward of its own is saved as a module for PEFT, which adds the branch outside.",
        tests=("tests/test_adapter_files.py",),
    ),
    Mutant(
        "branch_outside_of_a_hook", "settings", "export/adapters/peft.py",
        "if foreign is not None:", "if False:",
        "A module with a hook is saved as a module for PEFT, which runs the hook around the base alone.",
        tests=("tests/test_adapter_files.py",),
    ),
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "adalora_scale_of_what_is_left", "files", "export/adapters/peft.py",
        "    alpha, first = config[\"lora_alpha\"], config[\"init_r\"]\n",
        "    alpha, first = config[\"lora_alpha\"], config[\"target_r\"]\n",
        "An AdaLoRA of PEFT's is scaled by the rank that is left, and not by the one that its training began with.",
        tests=("tests/test_peft_adalora.py::test_we_read_what_peft_saves",),
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "shared_is_saved_nowhere", "rewrites", "export/adapters/own.py",
        "bases[h.adapter.owner(tensor)]",
        "bases[h.adapter]",
        "A file looks for what is shared at each site.",
        tests=of_rewrites("saved_copied_and_put_away_it_is_the_same"),
    ),
    # ── PEFT's configs ───────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "heads_of_a_task_stay", "files", "export/adapters/configs.py",
        'if heads := HEADS.get(str(config.get("task_type"))):', 'if heads := HEADS.get(""):',
        "The classifier of a SEQ_CLS config does not train.",
        tests=(f"{CONFIGS}::test_a_config_means_what_it_means_in_peft",),
    ),
    Mutant(
        "a_config_starts_as_it_pleases", "files", "export/adapters/configs.py",
        "if not isinstance(init, str | bool | None) or init not in _STARTS:",
        "if init not in _STARTS and (init := True) is None:",
        "A start by data is taken for one that leaves the base alone.",
        tests=(f"{CONFIGS}::test_what_has_no_meaning_here_is_refused_by_name",),
    ),
    Mutant(
        "a_config_has_numbers", "files", "export/adapters/configs.py",
        "replace(s, started=False, alone=alone)", "replace(s, started=True, alone=alone)",
        "Adapters of a config begin with A = B = 0, and no gradient reaches them.",
        tests=(f"{CONFIGS}::test_a_config_starts_as_adapters_do",),
    ),
    # ── transformers' folders and the Trainer's ──────────────────────────────────────────────────────────────────────
    Mutant(
        "checkpoints_hold_the_base", "files", "export/adapters/pretrained.py",
        "if plain_path(k) not in frozen and isinstance(t, torch.Tensor)}", "if isinstance(t, torch.Tensor)}",
        "A checkpoint of the Trainer holds the whole base.",
        tests=(f"{PRETRAINED}::test_a_checkpoint_holds_no_base_and_resumes_to_the_bit",),
    ),
    Mutant(
        "checkpoints_forget_what_trained", "files", "export/adapters/pretrained.py",
        "return {plain_path(name) for name in base_parameters(model)} - trained",
        "return {plain_path(name) for name in base_parameters(model)}",
        "What trained beside the adapters is in no checkpoint.",
        tests=(f"{PRETRAINED}::test_a_checkpoint_holds_no_base_and_resumes_to_the_bit",),
    ),
    Mutant(
        "a_checkpoint_of_others_loads", "files", "export/adapters/pretrained.py",
        '(wanted, given, "holds no {}")):', '(given, known, "holds no {}")):',
        "A checkpoint without some of the model's adapters leaves these as they are, silently.",
        tests=(f"{PRETRAINED}::test_a_checkpoint_of_another_model_is_refused_whole",),
    ),
    Mutant(
        "others_do_not_come_back", "files", "export/adapters/folder.py",
        'if header is None or not header.get("others"):', "if True:",
        "Of several adapters in a checkpoint one comes back.",
        tests=(f"{PRETRAINED}::test_several_adapters_come_back_with_those_that_acted",),
    ),
    Mutant(
        "baked_and_scaled", "files", "export/adapters/values.py",
        "(h.adapter.B.double() * h.adapter.scale)", "h.adapter.B.double()",
        "A scale that is to be baked into B is lost.",
        tests=(f"{PRETRAINED}::test_baked_scales_leave_one_rank_and_the_scale_one",),
    ),
    Mutant(
        "ranks_differ_when_baked", "files", "export/adapters/peft_files.py",
        "targets = {name: _Target.of(own, rslora, most)", "targets = {name: _Target.of(own, rslora)",
        "A file for readers that ignore rank_pattern has one.",
        tests=(f"{PRETRAINED}::test_baked_scales_leave_one_rank_and_the_scale_one",),
    ),
    Mutant(
        "pissa_is_written_at_half_its_scale", "kinds", "export/adapters/values.py",
        "        alpha = a.scale * rank\n", "        alpha = a.alpha\n",
        "The LoRA that a PiSSA adapter is written as has the alpha of half its rank.",
        tests=of_principal("files_are_plain_lora_of_twice_the_rank_on_the_base_that_was"),
    ),
    Mutant(
        "blocks_as_they_were_called", "rewrites", "export/adapters/files.py",
        '    if adapter.kind.behind is None:\n        return {}\n',
        '    if True:\n        return {}\n',
        "A file names the blocks by the paths in the model that was adapted, not in the one that is saved.",
        tests=of_prefixes("saved_from_inside_of_another_model"),
    ),
    # ── other numbers in place ───────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "scale_of_the_old_numbers", "files", "export/adapters/replace.py",
        'for key in ("rank", "alpha", "scaling") if key', 'for key in ("rank",) if key',
        "Replaced numbers are multiplied with the old alpha.",
        tests=("tests/test_replace.py::test_a_lower_rank_is_filled_with_zeros_and_saved_without_them",),
    ),
    Mutant(
        "replaced_in_part", "files", "export/adapters/replace.py",
        "            _begin_anew(place)\n", "            pass\n",
        "A file that has nothing for some of the weights leaves the old numbers there.",
        tests=("tests/test_replace.py::test_where_a_file_has_nothing_the_adapter_adds_nothing",),
    ),
    Mutant(
        "replaced_for_one_of_two_modules", "files", "export/adapters/replace.py",
        "if there and not there.intersection(place.weights):", "if False:",
        "What PEFT trained for one of two modules that share a weight acts in both.",
        tests=("tests/test_replace.py::test_what_does_not_fit_is_refused_and_the_model_is_what_it_was",),
    ),
    Mutant(
        "begun_anew_in_all_its_room", "files", "export/adapters/replace.py",
        "    adapter.put({name: own[name][tuple(map(slice, shape))].clone() for name, shape in shapes.items()})\n", "",
        "What begins anew has numbers behind its ranks, which no file can hold.",
        tests=("tests/test_replace.py::test_where_a_file_has_nothing_the_adapter_adds_nothing",),
    ),
    Mutant(
        "a_swap_draws_random_numbers", "files", "export/adapters/replace.py",
        "with torch.no_grad(), torch.random.fork_rng(devices):", "with torch.no_grad():",
        "Other numbers in place change what the next dropout draws.",
        tests=("tests/test_replace.py::test_where_a_file_has_nothing_the_adapter_adds_nothing",),
    ),
    Mutant(
        "replaced_for_good", "files", "export/adapters/replace.py",
        "facts.undo.append(partial(parameter.detach().copy_, parameter.detach().clone()))", "pass",
        "What is refused after the numbers were written leaves them there.",
        tests=("tests/test_replace.py::test_an_infinite_delta_is_undone",),
    ),
    Mutant(
        "a_config_of_pissa_is_plain_lora", "files", "export/adapters/configs.py",
        'own = s.kind if kind == "lora" else kind_named(kind)', "own = s.kind",
        "A config that says pissa starts with B = 0 at random directions.",
        tests=("tests/test_peft_configs.py::test_starts_in_what_a_weight_is_made_of",),
    ),
    Mutant(
        "a_resized_row_that_was_trained_counts_twice", "files", "export/adapters/beside.py",
        "        return more_rows((base", "        own = set()\n        return more_rows((base",
        "A row of a resized vocabulary that was trained as a token's is added twice.",
        tests=("tests/test_peft_beside.py::test_a_resized_vocabulary",),
    ),
    Mutant(
        "a_resized_base_lies_beside_its_trained_rows", "files", "export/adapters/beside.py",
        "UNDER_TOKENS if alike else \".\"", "\".\"",
        "A resized base weight is written where PEFT, which trains rows of it, does not look.",
        tests=("tests/test_peft_beside.py::test_a_resized_vocabulary",),
    ),
    Mutant(
        "scales_are_not_baked_for_dialects", "files", "export/adapters/files.py",
        "files = as_peft(model, held, name, one_rank=bake_scales)", "files = as_peft(model, held, name)",
        "A baked file of kohya's has an alpha for each rank, of which diffusers reads one.",
        tests=("tests/test_adapter_dialects.py::test_a_file_of_several_alphas_says_who_misreads_it",),
    ),
    Mutant(
        "several_alphas_unsaid", "files", "export/adapters/files.py",
        "    if len(alphas) > 1:\n", "    if False:\n",
        "A kohya file that diffusers reads wrongly is written without a word.",
        tests=("tests/test_adapter_dialects.py::test_a_file_of_several_alphas_says_who_misreads_it",),
    ),
    Mutant(
        "classes_of_a_program", "files", "export/adapters/dialects.py",
        "        _refuse_classless(model, folder)\n", "        pass\n",
        "A file of PEFT's for an exported program is said to be damaged.",
        tests=("tests/test_graph_module.py::test_an_adapter_goes_into_a_program_in_our_own_format",),
    ),
)  # fmt: skip
