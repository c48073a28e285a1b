"""Defects of `lora_fx/graph`."""

from __future__ import annotations

from tests.mutants.table import GAPS, GRADIENTS, INTERRUPTS, Mutant, of_sites

ROWS = (
    # ── the algebra: factors, scale, forms ───────────────────────────────────────────────────────────────────────────
    Mutant(
        "conv_dilation_ignored", "algebra", "lora_fx/graph/forms.py",
        'o["padding"], o["dilation"], o["groups"])', 'o["padding"], 1, o["groups"])',
        'The branch of a convolution has no dilation; with padding="same" no shape tells.',
        tests=("tests/test_forms.py",),
    ),
    Mutant(
        "conv_groups_interleaved", "algebra", "lora_fx/graph/forms.py",
        'A = A.repeat(o["groups"], *[1] * (len(call.sides) - 1))', 'A = A.repeat_interleave(o["groups"], 0)',
        "Each group of a convolution reads one row of A several times; rank 1 and a single group show nothing.",
        tests=("tests/test_forms.py",),
    ),
    Mutant(
        "conv_transpose_groups_mixed", "algebra", "lora_fx/graph/forms.py",
        "A = A.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)",
        "A = A.unflatten(1, (-1, groups)).permute(2, 0, 1).flatten(0, 1)",
        "The input channels of a grouped transposed convolution go to the wrong groups.",
        zoo="native-deconv",
    ),
    Mutant(
        "addmm_alpha_ignored", "algebra", "lora_fx/graph/forms.py",
        "z if isinstance(alpha, int) and alpha == 1 else z * alpha", "z",
        "addmm(..., alpha=a) multiplies the weight by a, and its branch not.",
        tests=("tests/test_forms.py",),
    ),
    Mutant(
        "form_of_another_library", "algebra", "lora_fx/graph/forms.py",
        'return func._schema.name.removeprefix("aten::")', 'return func._schema.name.rpartition("::")[2]',
        "An op of another library is read as torch's op of the same name.",
        tests=("tests/test_open_forms.py",),
    ),
    Mutant(
        "delta_transposed_where_square", "algebra", "lora_fx/graph/layout.py",
        "return self.to_weight(B @ A)",
        "return self.to_weight((B @ A).mT if self.size('i') == self.size('o') else B @ A)",
        "The dense delta of square weights is transposed; no shape tells.",
        zoo="native-lstm,native-bilinear,native-mha",
    ),
    # ── layouts and views ────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "view_step_ignored", "layouts", "lora_fx/graph/views.py",
        "strides[d] * step\n", "strides[d]\n",
        "Every second row of a weight reads as the rows in front.",
    ),
    Mutant(
        "chunks_rounded_down", "layouts", "lora_fx/graph/views.py",
        "-(-v.shape[v.dim(dim)] // chunks)", "max(v.shape[v.dim(dim)] // chunks, 1)",
        "chunk() of a size that does not divide evenly cuts elsewhere than torch does.",
    ),
    Mutant(
        "select_forgets_the_offset", "layouts", "lora_fx/graph/views.py",
        "offset = self.offset + (index % self.shape[d]) * self.strides[d]",
        "offset = (index % self.shape[d]) * self.strides[d]",
        "W[8:][0] reads as W[0].",
    ),
    Mutant(
        "element_located_by_the_wrong_axis", "layouts", "lora_fx/graph/layout.py",
        "index = own if index is None else index * axis.size + own",
        "index = own if index is None else index + own",
        "The exact sum of a doubtful element takes the factors of another one, where a side has several axes (heads).",
    ),
    # ── capture ──────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "capture_leaves_eval_mode", "capture", "lora_fx/graph/own_state.py",
        "self._keep_all([*modules, *buffers_away(model)])", "self._keep_all(p for m in modules for p in m.buffers())",
        "Capturing a model in train mode leaves it in eval mode.",
    ),
    Mutant(
        "written_parameters_not_put_back", "capture", "lora_fx/graph/written.py",
        '                alias.copy_(numbers)\n', '                pass\n',
        "What a forward writes to a parameter stays after a run to look at it.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "replaced_data_not_put_back", "capture", "lora_fx/graph/written.py",
        '            p.data = alias\n', '            pass\n',
        "A parameter whose data a forward replaces stays on the new storage.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "recordings_unseen", "capture", "lora_fx/graph/written.py",
        '            self.before(func, args, kwargs)\n            return call', '            return call',
        "What a forward writes while it is recorded stays.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "looking_sees_nothing", "capture", "lora_fx/graph/written.py",
        '        self._writes.before(func, args, kwargs)\n', '',
        "What a forward writes in a mode in which nothing is recorded stays.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "one_look_for_all_modes", "capture", "lora_fx/graph/written.py",
        'return verb == verb_number() and _mode(model) in modes', 'return verb == verb_number()',
        "What a forward writes in train mode alone stays, since it was recorded in eval mode.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "one_look_with_and_without_gradients", "capture", "lora_fx/graph/written.py",
        'return torch.is_grad_enabled(), frozenset', 'return False, frozenset',
        "What a forward writes where gradients are wanted alone stays.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "one_look_for_all_verbs", "capture", "lora_fx/graph/written.py",
        'return verb == verb_number() and _mode(model) in modes', 'return _mode(model) in modes',
        "What a forward writes in another step than the first one that was looked at stays.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "written_to_is_forgotten", "capture", "lora_fx/graph/written.py",
        '_written.setdefault(module, set()).add(name)', 'pass',
        "What was seen to be written to is not copied where nothing looks.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "writes_through_an_alias_unseen", "capture", "lora_fx/graph/written.py",
        'if storage in self._places and storage not in self._copies:',
        'if storage in self._places and tensor.data_ptr() in [t.data_ptr() for *_, t in self._places[storage]]:',
        "A write through a slice of a parameter is not undone.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "all_parameters_copied", "capture", "lora_fx/graph/written.py",
        'for number, name in _writes(func):', 'for number, name in _writes(func) or ((1, ""),):',
        "A parameter that an op only reads is copied before it runs.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "batch_norms_writes_unseen", "capture", "lora_fx/graph/written.py",
        'a.name in _UNSAID or ', '',
        "Statistics that are parameters move, since the schema of a batch norm does not say so.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "equal_data_is_a_write", "capture", "lora_fx/graph/written.py",
        'not _same(p, alias)', 'True',
        "A weight that is laid out anew, with the same numbers, is refused.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "another_parameter_unseen", "capture", "lora_fx/graph/written.py",
        'm._parameters.get(name) is not p]', 'False]',
        "A forward that registers another Parameter in place of its weight is adapted.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "looking_compiles", "capture", "lora_fx/graph/own_state.py",
        "    if look is not None and unknown and _may_be_compiled():\n", "    if False:\n",
        "What is compiled runs below the mode that looks for writes, where it cannot.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "looking_takes_the_plain_schedule", "capture", "lora_fx/graph/written.py",
        "return all(type(mode) is Looking for mode in", "return all(False for mode in",
        "Where a check looks for writes, it runs another schedule than its user will.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "capture_moves_buffers", "capture", "lora_fx/graph/own_state.py",
        "                self.undo.append(partial(_restore_tensor, value, alias, _told_apart(alias).clone()))\n", "",
        "Running a model to look at it moves its batch statistics.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_draws_random_numbers", "capture", "lora_fx/graph/own_state.py",
        "with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):", "with contextlib.nullcontext():",
        "Looking at a model changes the random numbers drawn after that.",
    ),
    Mutant(
        "capture_fills_logs", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(_restore_list, value, list(value)))", "pass",
        "Looking at a model appends to its lists.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_objects", "capture", "lora_fx/graph/own_state.py",
        "elif package not in _OTHERS:", "elif False:",
        "Looking at a model moves the counters of its meters.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_of_what_is_expanded", "capture", "lora_fx/graph/own_state.py",
        "if stride == 0 and size > 1:", "if False:",
        "A tensor that is kept, and shows one number under many indices, ends a look with torch's own error.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_measures_tuples", "capture", "lora_fx/graph/own_state.py",
        "inside = tuple.__iter__(value)", "inside = iter(value)",
        "A tuple of a class that has no length ends a look with that class's error.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_globals", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(_restore_item, scope, name, value))", "pass",
        "Looking at a model moves the globals that its code counts in.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_class_attributes", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(_restore_attribute, cls, name, value))", "pass",
        "Looking at a model moves what its class counts.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_pythons_random_state", "capture", "lora_fx/graph/own_state.py",
        "self.undo: list[Undo] = [partial(random.setstate, random.getstate())]", "self.undo: list[Undo] = []",
        "Looking at a model draws from Python's random numbers.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "computed_weight_accepted", "capture", "lora_fx/graph/program.py",
        "        if weight in self.made:", "        if False:",
        "The parameters behind a weight_norm are adapted, which means nothing.",
    ),
    Mutant(
        "unseen_not_told", "capture", "lora_fx/graph/program.py",
        "return tuple(w for w in self.weights if not w.uses)", "return ()",
        "The plan does not say which weights the example inputs never reached.",
        tests=(GAPS,),
    ),
    # ── checks of other kinds ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "scales_are_sites", "sites", "lora_fx/graph/program.py",
        "matrices = [n for n in made_of if not whole or", "matrices = [n for n in made_of if True or",
        "The gain of a standardised weight is adapted beside it.",
        tests=of_sites("a gain on it"),
    ),
    Mutant(
        "axes_of_computed_weights_forgotten", "sites", "lora_fx/graph/program.py",
        "_Seen(seen.weight, _axes(node, name, n, seen.view))", "_Seen(seen.weight, None)",
        "A mask makes the input features of a weight its outputs, and its experts one matrix.",
        tests=of_sites("mask of experts"),
    ),
    Mutant(
        "tables_are_modulated_weights", "sites", "lora_fx/graph/program.py",
        "size > 1 and all(_size(n, axis) == 1 for n in scales)", "True",
        "A table that scales activations is taken for a weight that they scale.",
        tests=of_sites("a table that scales activations is none"),
    ),
    Mutant(
        "weights_in_a_cond_not_told", "sites", "lora_fx/graph/program.py",
        "            if name in _BRANCHING:\n", "            if name in ():\n",
        "A weight that a branch of torch.cond multiplies with is left out without a word.",
        tests=("tests/test_sites.py::test_weights_inside_of_a_cond_are_refused_and_the_others_are_sites",),
    ),
    Mutant(
        "hooks_in_a_cond", "sites", "lora_fx/graph/capture.py",
        "        if torch.compiler.is_dynamo_compiling():  # a", "        if False:  # a",
        "A model that calls modules in a branch of torch.cond is not captured.",
        tests=("tests/test_sites.py::test_weights_inside_of_a_cond_are_refused_and_the_others_are_sites",),
    ),
    Mutant(
        "autocast_unknown", "sites", "lora_fx/graph/program.py",
        "for d in (dtype, *made))", "for d in (dtype,))",
        "A model with autocast in its forward is held to float32's bounds, and refused.",
        tests=("tests/test_sites.py::test_autocast_inside_the_forward",),
    ),
    Mutant(
        "casts_of_a_check_are_kept", "sites", "lora_fx/graph/own_state.py",
        "        self.undo.append(torch.clear_autocast_cache)\n", "",
        "Under autocast a fresh adapter computes with the numbers that the self-check filled in.",
        tests=("tests/test_sites.py::test_autocast_around_apply",),
    ),
    # ── changes: wholly or not at all, while the model rests ─────────────────────────────────────────────────────────
    Mutant(
        "no_safe_point_while_recording", "changes", "lora_fx/graph/capture.py",
        "        safe_point()\n        return create", "        return create",
        "A capture cannot be stopped before it has run the model.",
        tests=(f"{INTERRUPTS}::test_what_a_handler_raises_is_not_taken_for_the_models_own_error",),
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "padding_trains", "gradients", "lora_fx/graph/forms.py",
        "torch.where((indices == index).unsqueeze(-1), out.detach(), out)", "out",
        "Tokens of padding train A and B, and the row of W + δ would get nothing.",
        tests=(f"{GRADIENTS}::test_padding_trains_nothing",),
    ),
    Mutant(
        "other_paddings_train", "gradients", "lora_fx/graph/forms.py",
        "        if not weight_first:\n            return None\n", "",
        "F.embedding counts a negative index from the end, and its row trains A and B.",
        tests=(f"{GRADIENTS}::test_padding_trains_nothing",),
    ),
    Mutant(
        "adapters_left_in_eval_mode", "gradients", "lora_fx/graph/own_state.py",
        "partial(setattr, module, \"training\", module.training)", "partial(int)",
        "After an export or a capture dropouts of adapters are off.",
        tests=("tests/test_onnx.py::test_flags_gradients_and_random_state_stay",),
    ),
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "factors_put_away", "places", "lora_fx/graph/places.py",
        "                own.pre_forward(self)\n                own.offload = False\n", "",
        "accelerate puts the factors away until somebody calls their module, which nobody does: garbage.",
    ),
    Mutant(
        "shards_captured", "places", "lora_fx/graph/capture.py",
        "    refuse_shards(model)\n", "",
        "A model in parts is captured, and waits for the other processes.",
    ),
    Mutant(
        "storages_by_luck", "places", "lora_fx/graph/program.py",
        "    if storage == id(tensor):\n        return (storage,)\n", "",
        "A tensor without a storage is asked for its strides.",
    ),
    Mutant(
        "written_weight_adapted", "capture", "lora_fx/graph/program.py",
        "        self._refuse_written()\n", "",
        "A weight that the forward itself writes to is adapted, and its outputs are not those of W + δ.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "max_norm_adapted_without_inputs", "capture", "lora_fx/graph/program.py",
        'if getattr(owner, "max_norm", None) is not None and isinstance(owner, nn.Embedding | nn.EmbeddingBag):',
        "if False:",
        "A table whose lookups scale its rows down is adapted where no example input is given.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "a_look_without_memory_passed_over", "capture", "lora_fx/graph/own_state.py",
        "            except (MemoryError, torch.OutOfMemoryError):\n                raise\n", "",
        "Where a look at what a forward writes finds no memory, the run goes on without having looked.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "a_look_of_what_runs_as_python", "capture", "lora_fx/graph/own_state.py",
        "    was, _stance.eager = _stance.eager, True\n", "    was = _stance.eager\n",
        "Where nothing compiled can run, a model is run once more to see what it writes.",
        tests=("tests/test_written.py",),
    ),
    Mutant(
        "data_is_a_constant", "capture", "lora_fx/graph/written.py",
        "            return args[0].detach()\n", "            pass\n",
        "What is read as `.data` is a constant of the recording: on meta nobody knows whose it is.",
        tests=("tests/test_written.py::test_what_is_read_as_data_is_recorded",),
    ),
    Mutant(
        "replaced_buffers_stay", "capture", "lora_fx/graph/own_state.py",
        "    if is_plain(value) and lies_at(value) != lies_at(alias):", "    if False:",
        "A buffer whose `.data` a forward has replaced keeps what it was given.",
        tests=("tests/test_written.py::test_a_buffer_whose_data_is_replaced_is_put_back",),
    ),
    Mutant(
        "frames_compiled_one_by_one", "dispatch", "lora_fx/graph/dynamo.py",
        "        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))\n", "",
        "Where Dynamo runs a forward as Python, each read of a weight in there is compiled.",
        tests=("tests/test_compiled.py",),
    ),
    Mutant(
        "a_row_for_another_operator", "dispatch", "lora_fx/graph/dynamo.py",
        "setdefault(operator.matmul,", "setdefault(operator.imatmul,",
        "Compiled, W @ x of a square weight is x @ W.",
        tests=("tests/test_compiled.py",),
    ),
    Mutant(
        "a_table_that_went_ends_the_trace", "dispatch", "lora_fx/graph/dynamo.py",
        "    except (ImportError, AttributeError):  # a torch without", "    except ImportError:  # a torch without",
        "A torch that has no table of reversed operators compiles no adapted model.",
        tests=("tests/test_compiled.py",),
    ),
    Mutant(
        "convolution_read_off_its_name", "dispatch", "lora_fx/graph/forms.py",
        'transposed = form.name == "conv_transpose"', 'transposed = op.startswith("conv_transpose")',
        "Dynamo knows no part of the name of a function of torch's: a convolution that dispatches breaks the graph.",
        tests=("tests/test_compiled.py",),
    ),
)  # fmt: skip
