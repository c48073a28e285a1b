"""Defects of `lora_fx/paper`."""

from __future__ import annotations

from tests.mutants.table import Mutant

SERVING = "tests/test_paper_serving.py"

ROWS = (
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "sweep_forgets_what_is_over", "paper", "lora_fx/paper/sweep.py",
        "{run.key: run for run in runs if run.key not in notes.found}", "{run.key: run for run in runs}",
        "A sweep that goes on trains everything again.",
        tests=("tests/test_sweep.py::test_an_interrupted_sweep_goes_on_where_it_was",),
    ),
    Mutant(
        "sweep_over_its_budget", "paper", "lora_fx/paper/sweep.py",
        "if self.cost[name] <= left]:", "if left > 0]:",
        "What is compared at one budget goes beyond it.",
        tests=("tests/test_sweep.py::test_what_is_compared_at_one_budget_has_it",),
    ),
    Mutant(
        "torn_note_is_read", "paper", "lora_fx/paper/notes.py",
        'text.rpartition("\\n")[0]', "text",
        "A line that an interrupted write has left is read.",
        tests=("tests/test_sweep.py::test_an_interrupted_sweep_goes_on_where_it_was",),
    ),
    # ── table 1 and task switching ───────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "folded_is_never_slower", "paper", "lora_fx/paper/latency.py",
        "folded.median in again, seen", "True, seen",
        "The verdict on folded LoRA is yes, whatever was measured.",
        tests=(f"{SERVING}::test_what_does_not_hold_is_said",),
    ),
    Mutant(
        "slower_without_an_interval", "paper", "lora_fx/paper/latency.py",
        "own.above(_ONE), seen", "own.median > 1, seen",
        "An adapter counts as slower though it is not told apart from the base.",
        tests=(f"{SERVING}::test_an_adapter_that_is_not_told_apart_is_not_slower",),
    ),
    Mutant(
        "one_session_of_the_base", "paper", "lora_fx/paper/latency.py",
        "o.ratio[self.system] / math.sqrt(o.ratio[AGAIN])", "o.ratio[self.system]",
        "An adapter is held against one session of the base, whose place in memory counts in full.",
        tests=(f"{SERVING}::test_openings_that_scatter_are_paired_with_both_sessions_of_the_base",),
    ),
    Mutant(
        "most_of_any", "paper", "lora_fx/paper/latency.py",
        "all_of(one.above(_ONE) for one in over)", "True",
        "An adapter counts as slowed most at the smallest size without a look at the others.",
        tests=(f"{SERVING}::test_what_does_not_hold_is_said",),
    ),
    Mutant(
        "sizes_compared_at_large", "paper", "lora_fx/paper/latency.py",
        "zip(own[one], own[other], strict=True)", "zip(sorted(own[one]), sorted(own[other])[::-1], strict=True)",
        "Two sizes are compared by what openings scatter by, twice, and not opening by opening.",
        tests=(f"{SERVING}::test_sizes_are_compared_opening_by_opening",),
    ),
    Mutant(
        "narrow_layers_know_all_words", "paper", "lora_fx/paper/latency.py",
        "* (self.width / 1024)", "",
        "Where layers are narrow the logits are most of the work, and no adapter shows beside them.",
        tests=(f"{SERVING}::test_a_smaller_shape_keeps_the_share_of_the_vocabulary",),
    ),
    Mutant(
        "lengths_stay", "paper", "lora_fx/paper/latency.py",
        "max(1, size.length // shorter)", "size.length",
        "Lengths are whole though they are to be divided.",
        tests=(f"{SERVING}::test_batches_and_lengths_are_divided_and_it_is_said",),
    ),
    Mutant(
        "sessions_of_any_size", "paper", "lora_fx/paper/latency.py",
        "options.add_free_dimension_override_by_name(axis, length)", "pass",
        "A session works out its shapes in every call.",
        tests=(f"{SERVING}::test_the_command_measures_files_that_are_what_torch_computes",),
    ),
    Mutant(
        "a_turn_is_a_call", "paper", "lora_fx/paper/latency.py",
        "1e3 * statistics.median(times[s]) / each", "1e3 * statistics.median(times[s])",
        "The time of many calls is given as that of one.",
        tests=(f"{SERVING}::test_a_time_is_one_of_a_call",),
    ),
    Mutant(
        "adapter_l_without_its_norm", "paper", "lora_fx/paper/latency.py",
        "layers * (each + 2 * d)", "layers * each",
        "Adapter L is counted without its LayerNorms.",
        tests=(f"{SERVING}::test_parameters_are_those_of_a_plan[Adapter L]",),
    ),
    Mutant(
        "openings_are_timed_again", "paper", "lora_fx/paper/latency.py",
        "if key not in notes.found}", "}",
        "A measurement that goes on times everything again.",
        tests=(f"{SERVING}::test_an_interrupted_measurement_goes_on_where_it_was",),
    ),
    Mutant(
        "interval_on_one_side", "paper", "lora_fx/paper/timing.py",
        "missed = [2 * sum(", "missed = [sum(",
        "An interval misses twice as often as it says.",
        tests=(f"{SERVING}::test_an_interval_has_the_confidence_that_it_says",),
    ),
    Mutant(
        "warm_up_counts", "paper", "lora_fx/paper/timing.py",
        "if number >= 0:", "if True:",
        "The first round, which warms up, is one of the times.",
        tests=(f"{SERVING}::test_rounds_call_everything_once_and_count_all_but_the_first",),
    ),
    Mutant(
        "weights_after_a_switch_unseen", "paper", "lora_fx/paper/switching.py",
        "if not torch.equal(tensor, own[name]):", "if False:",
        "A switch that leaves another task's weights is timed like any other.",
        tests=(f"{SERVING}::test_a_switch_that_leaves_the_weights_is_found",),
    ),
    # ── the paper: directions, subspaces, table 7, the command line ──────────────────────────────────────────────────
    Mutant(
        "phi_by_the_larger", "paper", "lora_fx/paper/subspaces.py",
        "overlap / torch.minimum(", "overlap / torch.maximum(",
        "φ(i, j) is divided by the larger of i and j, so that a subspace inside another is no 1.",
    ),
    Mutant(
        "random_overlap_by_the_smaller", "paper", "lora_fx/paper/subspaces.py",
        "return torch.maximum(i[:, None], j[None, :]) / d", "return torch.minimum(i[:, None], j[None, :]) / d",
        "Random subspaces are expected to overlap less than they do.",
    ),
    Mutant(
        "directions_of_the_core_transposed", "paper", "lora_fx/paper/factors.py",
        "(P @ vh.mT)[:, :n]", "(P @ vh)[:, :n]",
        "The right-singular directions are mixed by the transpose.",
    ),
    Mutant(
        "rounding_is_a_direction", "paper", "lora_fx/paper/factors.py",
        "n = int((s > s[0] * rounding).sum())", "n = len(s)",
        "Rows of zeros in A are directions of the adapter.",
    ),
    Mutant(
        "entropy_in_bits", "paper", "lora_fx/paper/factors.py",
        "(-share * share.log())", "(-share * share.log2())",
        "The effective rank is exp of an entropy in bits: n equal values count as more than n.",
    ),
    Mutant(
        "factors_of_a_file_lose_their_scale", "paper", "lora_fx/paper/factors.py",
        "scale = float(alphas[path]) / A.shape[0]", "scale = 1.0 / A.shape[0]",
        "The alpha of a file is not read.",
    ),
    Mutant(
        "parts_of_a_file_are_one", "paper", "lora_fx/paper/factors.py",
        "for entry in _entries(folder, name) or [_WHOLE]:", "for entry in [_WHOLE]:",
        "The query and the value of a fused weight are one adapter of twice the rank.",
    ),
    Mutant(
        "layers_in_no_order", "paper", "lora_fx/paper/factors.py",
        "sorted(pairs.items(), key=lambda pair: _in_order(pair[0]))", "reversed(sorted(pairs.items()))",
        "The layers of a file come in another order than the model's.",
    ),
    Mutant(
        "rank_above_the_weights", "paper", "lora_fx/paper/factors.py",
        "        if self.rank > min(out, inner):", "        if False:",
        "An adapter has more directions than its weight.",
    ),
    Mutant(
        "amplification_upside_down", "paper", "lora_fx/paper/amplification.py",
        "factor=norm / along,", "factor=along / norm,",
        "The amplification factor is its own inverse.",
    ),
    Mutant(
        "weakest_directions_of_w", "paper", "lora_fx/paper/amplification.py",
        "squares[-n:]", "squares[:n]",
        "The directions of W are those of its smallest singular values.",
    ),
    Mutant(
        "first_rows_of_the_base", "paper", "lora_fx/paper/base.py",
        "W.index_select(axis, torch.tensor(adapter.rows))", "W.narrow(axis, 0, len(adapter.rows))",
        "Every part of a fused weight is held against its query.",
    ),
    Mutant(
        "other_weights_compared", "paper", "lora_fx/paper/subspaces.py",
        "    matching(first, second)\n    found", "    found",
        "Adapters of different models are compared, or fail with a KeyError.",
    ),
    Mutant(
        "counts_are_rounded_only", "paper", "lora_fx/paper/counts.py",
        "(ROUND_DOWN, ROUND_HALF_UP))", "(ROUND_HALF_UP, ROUND_HALF_UP))",
        "18.87 million is not the 18.8 that the paper cuts it to.",
        tests=("tests/test_paper_counts.py::test_digits_are_cut_or_rounded",),
    ),
    Mutant(
        "prefixes_in_one_layer", "paper", "lora_fx/paper/counts.py",
        'else "prefix_layer"', 'else "tokens"',
        "Prefix-layer tuning has as few parameters as prefix-embedding tuning.",
        tests=("tests/test_paper_counts.py::test_other_methods_are_the_papers_formulas",),
    ),
)  # fmt: skip
