"""Defects of `lora_fx/analysis`."""

from __future__ import annotations

from tests.mutants.table import GAPS, Mutant, of_kinds

ROWS = (
    # ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "query_is_key", "roles", "lora_fx/analysis/dataflow.py",
        "return 1 if dim == -1 else 0", "return 0 if dim == -1 else 1",
        "In attention that is spelled out, query and key change places.",
    ),
    Mutant(
        "key_is_value", "roles", "lora_fx/analysis/roles.py",
        "(core.query, core.key, core.value), strict=True", "(core.query, core.value, core.key), strict=True",
        "Key and value change places.",
    ),
    Mutant(
        "gate_is_up", "roles", "lora_fx/analysis/dataflow.py",
        "gate, up = (a, b) if left.bent else (b, a)", "gate, up = (b, a) if left.bent else (a, b)",
        "The gate of an MLP and the factor beside it change places.",
    ),
    Mutant(
        "fused_part_shifted", "roles", "lora_fx/analysis/roles.py",
        "own = {rows[k] for k in features}", "own = {rows[(k + 1) % len(rows)] for k in features}",
        "The parts of a fused weight are cut one row too low.",
    ),
    Mutant(
        "glu_halves_swapped", "roles", "lora_fx/analysis/dataflow.py",
        "for start in (0, half))", "for start in (half, 0))",
        "The two halves in front of a glu change their roles.",
        tests=("tests/test_roles.py::test_a_fused_weight_is_split_exactly",),
    ),
    # ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "last_rule_decides", "rules", "lora_fx/analysis/rules.py",
        "chosen.update(dict.fromkeys(decided, rule))", "chosen.update(dict.fromkeys(matched, rule))",
        "The last rule that matches a site decides it: exclusions in front are lost.",
        tests=("tests/test_rules.py::test_the_first_rule_that_matches_decides_and_one_without_a_rank_excludes",),
    ),
    Mutant(
        "layers_end_early", "rules", "lora_fx/analysis/rules.py",
        "range(int(m[1]), int(m[2] or m[1]) + 1)", "range(int(m[1]), max(int(m[2] or m[1]), int(m[1]) + 1))",
        "layers='0-3' leaves layer 3 out.",
        tests=("tests/test_rules.py::test_layers_are_ranges_or_integers",),
    ),
    Mutant(
        "expect_ignored", "rules", "lora_fx/analysis/rules.py",
        "if not decided or rule.expect not in (None, len(decided)):", "if not decided:",
        "A rule that decides fewer sites than it expects is no error.",
        tests=("tests/test_rules.py::test_expect_counts_sites",),
    ),
    Mutant(
        "layer_is_the_last_integer", "rules", "lora_fx/analysis/sites.py",
        r're.search(r"(?:^|\.)(\d+)(?:\.|$)", name)', r're.search(r"(?:^|.*\.)(\d+)(?:\.|$)", name)',
        "layers.1.experts.0 counts as layer 0.",
        tests=(GAPS,),
    ),
    Mutant(
        "names_match_anywhere_in_their_case", "rules", "lora_fx/analysis/rules.py",
        "return any(fnmatchcase(name, glob) for glob in _globs(text))",
        "return any(fnmatchcase(name.lower(), glob.lower()) for glob in _globs(text))",
        "where='W' takes the weight w too.",
        tests=(GAPS,),
    ),
    # ── checks of other kinds ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "autocorrelation_is_a_router", "roles", "lora_fx/analysis/dataflow.py",
        "union(f.frontier for f in told if not f.pair and not f.spectral)", "union(f.frontier for f in told)",
        "Query and key of an attention by autocorrelation are routers.",
        tests=("tests/test_roles.py::test_what_mixes_tokens_is_no_router_and_no_mlp",),
    ),
    Mutant(
        "time_mixing_is_an_mlp", "roles", "lora_fx/analysis/dataflow.py",
        "        if self._is_pair(node, self.fact(gate), self.fact(up)):", "        if False:",
        "Receptance, key and value are gate and up.",
        tests=("tests/test_roles.py::test_what_mixes_tokens_is_no_router_and_no_mlp",),
    ),
    Mutant(
        "casts_of_a_bias_not_followed", "kinds", "lora_fx/analysis/biases.py",
        "first_operand(node) if name in MOVES or name in COPIES or name in CASTS else None",
        "first_operand(node) if name in COPIES else None",
        "A bias that is moved or cast before it is added is none.",
        tests=of_kinds("a_bias_is_found_behind_views_and_casts"),
    ),
    Mutant(
        "bias_that_is_added_not_found", "kinds", "lora_fx/analysis/biases.py",
        'in ("add", "add_", "__add__", "__iadd__")]', "in ()]",
        "x @ W + b has no bias.",
        tests=of_kinds("a_bias_is_found_where_it_is_added"),
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "mixed_output_is_a_head", "gradients", "lora_fx/analysis/roles.py",
        "return LM_HEAD if bit & flow.unmixed", "return LM_HEAD if bit & flow.out",
        "The last layer of a model with several residual streams is taken for its head.",
        tests=("tests/test_roles.py::test_what_is_mixed_before_it_is_returned_is_no_head",),
    ),
    Mutant(
        "words_of_peft_are_unknown", "rules", "lora_fx/analysis/words.py",
        'ours = _WORDS[word](value) if word in _WORDS else ""', 'ours = ""',
        "Rule(r=8) is refused without the word for it here.",
        tests=("tests/test_peft_configs.py::test_words_of_peft_are_answered_with_ours",),
    ),
    Mutant(
        "nearest_of_none", "rules", "lora_fx/analysis/rules.py",
        "    if not sites:\n        return rule", "    if False:\n        return rule",
        "In a model without weights the remedy is the nearest of 0 sites.",
        tests=("tests/test_refusals.py::test_a_model_without_weights_is_not_told_what_is_nearest",),
    ),
)  # fmt: skip
