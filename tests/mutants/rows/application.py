"""Defects of `lora_fx/application`."""

from __future__ import annotations

from tests.mutants.table import Mutant, of_rewrites

ROWS = (
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "budget_keeps_the_least", "kinds", "lora_fx/application/budget.py",
        "scores.argsort(descending=True, stable=True)", "scores.argsort(stable=True)",
        "The budget keeps the singular values that matter least.",
        tests=("tests/test_budget.py::test_the_most_important_ones_act_by_the_formulas_of_the_paper",),
    ),
    Mutant(
        "importance_without_vectors", "kinds", "lora_fx/application/budget.py",
        'own["singular"].squeeze(-1) + own["P"].mean(-2) + own["Q"].mean(-1)', 'own["singular"].squeeze(-1)',
        "The importance of a singular value leaves out its two vectors.",
        tests=("tests/test_budget.py::test_the_most_important_ones_act_by_the_formulas_of_the_paper",),
    ),
    Mutant(
        "suggests_without_costs", "kinds", "lora_fx/application/suggestion.py",
        "((own / costs[n], n) for n, values", "((own, n) for n, values",
        "Ranks are given to where the loss falls most, whatever they cost.",
        tests=("tests/test_suggest.py::test_no_choice_of_as_many_parameters_decreases_more",),
    ),
    Mutant(
        "suggests_in_random_directions", "kinds", "lora_fx/application/suggestion.py",
        "        return True\n\n    def close", "        return False\n\n    def close",
        "Of a wide gradient what it does to random directions is taken for its own, without a second pass.",
        tests=("tests/test_suggest.py::test_a_wide_gradient_is_found_without_being_kept",),
    ),
    Mutant(
        "suggestion_keeps_the_gradients", "kinds", "lora_fx/application/suggestion.py",
        "            s.add(parameter.grad)\n        parameter.grad = None", "            s.add(parameter.grad)",
        "The gradients of all weights are there at once.",
        tests=("tests/test_suggest.py::test_no_more_than_one_gradient_is_there_at_a_time",),
    ),
    Mutant(
        "suggestion_steps_upwards", "kinds", "lora_fx/application/suggestion.py",
        "wide * (-rate / adapter.scale)", "wide * (rate / adapter.scale)",
        "The measured step goes up the gradient.",
        tests=("tests/test_suggest.py::test_a_measured_step_is_the_dense_one",),
    ),
    Mutant(
        "suggestion_of_the_whole_weight", "kinds", "lora_fx/application/suggestion.py",
        "if self.row.rows is not None:\n            G =", "if False:\n            G =",
        "The gradient of a part of a weight is that of the whole.",
        tests=("tests/test_suggest.py::test_the_step_is_what_was_predicted_to_first_order_site_by_site",),
    ),
    Mutant(
        "tied_counted_twice", "kinds", "lora_fx/application/trained.py",
        "    parameters = list(dict.fromkeys(model.parameters()))",
        "    parameters = [p for m in model.modules() for p in m._parameters.values() if p is not None]",
        "A summary counts what has two names twice.",
        tests=("tests/test_trained.py::test_a_summary_counts_each_parameter_once",),
    ),
    Mutant(
        "a_goes_as_fast_as_b", "kinds", "lora_fx/application/trained.py",
        'if name == "B"}', 'if name in "AB"}',
        "LoRA+ gives A the rate of B.",
        tests=("tests/test_trained.py::test_b_alone_goes_faster",),
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "loss_counts_tokens", "rewrites", "lora_fx/application/tokens.py",
        "row.all(_IGNORED, tensor)",
        "row.all(0, tensor)",
        "A loss asks for what new tokens stand for.",
        tests=of_rewrites("tokens_are_put_into_a_batch"),
    ),
    Mutant(
        "positions_behind_an_infix_before_it", "rewrites", "lora_fx/application/tokens.py",
        "self.prefix + self.infix * behind",
        "self.prefix + self.infix",
        "The prompt's positions leave room for the infix behind it.",
        tests=of_rewrites("tokens_are_put_into_a_batch"),
    ),
    Mutant(
        "infix_behind_padding", "rewrites", "lora_fx/application/tokens.py",
        "ends = torch.where(first < length, first, ends)",
        "ends = first",
        "In a row without labels the infix stands behind its padding.",
        tests=of_rewrites("tokens_are_put_into_a_batch"),
    ),
    Mutant(
        "all_act_again", "files", "lora_fx/application/pretrained.py",
        "if wanted is not None and wanted !=", "if False and wanted !=",
        "Of several adapters that come back all act.",
        tests=("tests/test_pretrained.py::test_several_adapters_come_back_with_those_that_acted",),
    ),
    Mutant(
        "the_reference_is_the_policy", "files", "lora_fx/application/reference.py",
        "with active(model, *self._names):", "if True:",
        "The reference of preference training is the adapted model.",
        tests=("tests/test_pretrained.py::test_the_reference_is_the_base_to_the_bit_without_memory",),
    ),
    Mutant(
        "the_reference_leaves_eval", "files", "lora_fx/application/reference.py",
        "module.training = training", "module.training = False",
        "After a call of the reference the policy is in eval mode.",
        tests=("tests/test_pretrained.py::test_the_reference_is_the_base_to_the_bit_without_memory",),
    ),
    Mutant(
        "a_block_gives_itself_for_every_folder", "files", "lora_fx/application/reference.py",
        "same = str(path) == str(model.name_or_path) and issubclass(type(model), asked)",
        "same = issubclass(type(model), asked)",
        "Inside a reference's block whatever is loaded is the reference.",
        tests=("tests/test_pretrained.py::test_inside_its_block_who_loads_the_base_gets_the_reference",),
    ),
    Mutant(
        "a_block_is_for_all_threads", "files", "lora_fx/application/reference.py",
        "if same and thread == threading.get_ident():", "if same:",
        "Other threads get the reference of a block too.",
        tests=("tests/test_pretrained.py::test_inside_its_block_who_loads_the_base_gets_the_reference",),
    ),
    Mutant(
        "a_block_leaves_transformers_patched", "files", "lora_fx/application/reference.py",
        "self.cls.from_pretrained = self.plain  # type: ignore[attr-defined]", "pass",
        "After its block a reference is still given for the base.",
        tests=("tests/test_pretrained.py::test_inside_its_block_who_loads_the_base_gets_the_reference",),
    ),
    Mutant(
        "a_block_gives_another_dtype", "files", "lora_fx/application/reference.py",
        "        if name in own and value in own[name]:", "        if name in own:",
        "A reference of another dtype or attention is asked for, and the model's own is given.",
        tests=("tests/test_pretrained.py::test_a_block_refuses_another_model_than_its_own",),
    ),
    Mutant(
        "a_reference_of_no_adapter", "files", "lora_fx/application/reference.py",
        "if not here.adapters and not here.folded:", "if False:",
        "The reference of a model without adapters is the model that trains.",
        tests=("tests/test_pretrained.py::test_a_reference_of_no_adapter_and_modules_of_its_own_are_refused",),
    ),
    Mutant(
        "a_reference_known_by_less_than_it_is", "files", "lora_fx/application/reference.py",
        "if own.name not in self._names)", "if True)",
        "What is kept of a reference with an adapter is taken for that of the base.",
        tests=("tests/test_pretrained.py::test_adapters_that_are_named_act_in_the_reference",),
    ),
)  # fmt: skip
