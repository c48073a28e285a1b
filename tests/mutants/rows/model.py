"""Defects of `lora_fx/model`."""

from __future__ import annotations

from tests.mutants.table import GAPS, Mutant, of_kinds, of_prefixes

ROWS = (
    # ── tracing and wiring ───────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "weights_left_trainable", "insert", "lora_fx/model/training.py",
        "parameter.requires_grad_(False)", "parameter.requires_grad_(parameter.requires_grad)",
        "The base weights train along with the adapters.",
    ),
    Mutant(
        "attributes_baked_in", "wiring", "lora_fx/model/classes.py",
        'if (name in spec.baked or name == "forward") and', 'if name == "forward" and',
        "Stride, dilation or padding mode of a convolution set after apply have no effect.",
        tests=("tests/test_integration.py::test_an_attribute_changed_after_apply_takes_effect", "tests/test_purity.py"),
    ),
    Mutant(
        "replaced_forward_loses_the_branch", "wiring", "lora_fx/model/classes.py",
        'if (name in spec.baked or name == "forward") and', "if name in spec.baked and",
        "A forward that is set on the module after apply reads the weight without its branch.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attribute_under_a_derived_class", "wiring", "lora_fx/model/classes.py",
        "        if not is_generated(type(self)):\n            raise", "        if False:\n            raise",
        "An attribute set after another tool derived a class takes that class away.",
        tests=("tests/test_refusals.py::test_an_attribute_of_a_forward_under_a_derived_class",),
    ),
    Mutant(
        "taken_weight_left_out", "wiring", "lora_fx/model/inventory.py",
        "        if attribute not in module._parameters:", "        if attribute is None:",
        "The branch of a weight that is pruned after apply is left out of fold and files.",
        tests=("tests/test_refusals.py::test_a_weight_that_another_tool_has_taken_over",
               "tests/test_refusals.py::test_a_folded_weight_that_another_tool_has_taken_over"),
    ),
    Mutant(
        "derived_class_lost", "wiring", "lora_fx/model/classes.py",
        "spec_of(module) is not None and not is_generated(type(module)):", "False:",
        "Fold and switch take away the class that a parametrization or fully_shard gave an adapted module.",
        tests=("tests/test_refusals.py::test_a_weight_that_another_tool_has_taken_over",),
    ),
    Mutant(
        "classes_confused", "wiring", "lora_fx/model/classes.py",
        "self.reads, self.source, names", "self.reads, names",
        "Modules of one class share one generated forward, whatever scale and dropout stand in it.",
    ),
    Mutant(
        "inactive_adapter_acts", "wiring", "lora_fx/model/inventory.py",
        "if a.active or not active}", "}",
        "A deactivated adapter goes on acting.",
        tests=("tests/test_graph_module.py", "tests/test_fold.py", GAPS),
    ),
    # ── passes and pipelines ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "unknown_adapter_ignored", "passes", "lora_fx/model/inventory.py",
        "            if name not in self.names:", "            if False:",
        "A mistyped adapter is activated, removed and saved in silence.",
    ),
    # ── fold ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "folded_once_for_each_owner", "fold", "lora_fx/model/inventory.py",
        "readers = storages.setdefault(storage_of(parameter), {})",
        "readers = storages.setdefault(id(module), {})",
        "A tied weight is folded as often as it has owners.",
        tests=("tests/test_rules.py", GAPS), zoo="native-tied",
    ),
    # ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "first_adapter_for_all", "dropping", "lora_fx/model/classes.py",
        'return f"{first}{indent}{start}{name}."', 'return f"{first}{indent}{start}{min(held)}."',
        "With two adapters a generated forward reads the factors of one twice.",
    ),
    # ── folds of other kinds ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "bias_storages_left_out", "kinds", "lora_fx/model/inventory.py",
        "                if parameter is not None:\n",
        "                if parameter is not None and parameter.ndim > 1:\n",
        "What is no matrix is not folded.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "frozen_again_by_each_apply", "settings", "lora_fx/model/training.py",
        "if not inventory(model).adapters:", "if True:",
        "A second adapter freezes the head that the user lets train.",
    ),
    Mutant(
        "trained_beside_left_out", "settings", "lora_fx/model/training.py",
        "if beside != REFUSE or not (trained := trained_beside(model)):", "if True:",
        "save_adapter leaves out a head that trains, without a word.",
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "class_attributes_of_ours", "gradients", "lora_fx/model/classes.py",
        "setattr(base, name, value) if base else type.__setattr__", "type.__setattr__",
        "`type(self).calls += 1` counts on a class that is gone with the adapter.",
        tests=("tests/test_dispatch.py::test_what_code_sets_on_type_self_lands_on_the_models_own_class",),
    ),
    Mutant(
        "trl_gets_the_head", "files", "lora_fx/model/marks.py",
        'if caller.partition(".")[0] == "trl":', "if False:",
        "TRL multiplies with the weight of an adapted head, without its branch.",
        tests=("tests/test_pretrained.py::test_trl_is_refused_an_adapted_head",),
    ),
    Mutant(
        "a_call_that_fails_goes_on", "rewrites", "lora_fx/model/behind.py",
        '                own.leave(was)',
        "                own.leave(was if 'output' in locals() else own.enter())",
        "After a call that has raised, the next one is inside of it.",
        tests=of_prefixes("a_call_inside_of_a_call_and_one_that_fails_leave_the_outer_one_its_ids"),
    ),
    Mutant(
        "removed_it_stands_behind", "rewrites", "lora_fx/model/behind.py",
        '    gone = set(adapters)',
        '    gone = set()',
        "A removed adapter is kept on the blocks that it stood behind.",
        tests=of_prefixes("removed_and_refused_it_leaves_nothing"),
    ),
    Mutant(
        "base_gets_what_init_subclass_sets", "wiring", "lora_fx/model/classes.py",
        ' or _classes.get(spec.key) is not cls:', ':',
        "What __init_subclass__ sets of a class of ours, a forward around its own, is set of the model's own class.",
        tests=("tests/test_dispatch.py::test_what_init_subclass_sets_of_a_class_of_ours_is_set_of_that_class",),
    ),
    Mutant(
        "conversions_left_behind", "wiring", "lora_fx/model/marks.py",
        '        del module.__dict__["_weight_conversions"]\n',
        '        module.__dict__["_weight_conversions"] = None\n',
        "remove leaves an attribute of transformers' on the model that it had not.",
        tests=("tests/test_integration.py::test_removed_it_leaves_a_library_model_the_attributes_that_it_had",),
    ),
    Mutant(
        "matmul_never_reversed", "dispatch", "lora_fx/model/classes.py",
        "    if is_dynamo_compiling():\n        reverse_matmul()\n", "",
        "Compiled, W @ x of a square weight is x @ W: Dynamo is not told.",
        tests=("tests/test_compiled.py",),
    ),
)  # fmt: skip
