"""Defects of `lora_fx/deltas`: activation rewrites, and what they know of a call."""

from __future__ import annotations

from tests.mutants.table import Mutant, of_prefixes, of_rewrites

ROWS = (
    # ── the paper: directions, subspaces, table 7, the command line ──────────────────────────────────────────────────
    Mutant(
        "bottlenecks_without_biases", "paper", "lora_fx/deltas/rewrites.py",
        '{"down_bias": (space.rank,), "up_bias": (d,), **norm}', "norm",
        "Adapter layers have no biases, and their counts are below the paper's.",
        tests=("tests/test_paper_counts.py::test_other_methods_are_the_papers_formulas",),
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "bottleneck_without_the_residual", "rewrites", "lora_fx/deltas/rewrites.py",
        "return y + F.linear(z, up, theta.up_bias)",
        "return F.linear(z, up, theta.up_bias)",
        "What a bottleneck gives stands in the place of y.",
        tests=of_rewrites("a_linear_of_each_is_what_its_paper_says"),
    ),
    Mutant(
        "bottleneck_starts_at_random", "rewrites", "lora_fx/deltas/rewrites.py",
        "    theta.up.zero_()\n",
        "    theta.up.uniform_(-bound, bound)\n",
        "A fresh bottleneck is not the identity.",
        tests=of_rewrites("each_system_trains_by_rules_alone_and_exactly_its_own"),
    ),
    Mutant(
        "norm_of_a_bottleneck_untrained", "rewrites", "lora_fx/deltas/rewrites.py",
        "(use.space.out,), theta.norm_weight, theta.norm_bias)",
        "(use.space.out,))",
        "The LayerNorm of Adapter L has no weight and no bias.",
        tests=of_rewrites("a_linear_of_each_is_what_its_paper_says"),
    ),
    Mutant(
        "kronecker_the_other_way_round", "rewrites", "lora_fx/deltas/rewrites.py",
        '"iab,ipf,ifq->apbq"',
        '"iab,ipf,ifq->paqb"',
        "Of A ⊗ B a compacter makes B ⊗ A.",
        tests=of_rewrites("a_linear_of_each_is_what_its_paper_says"),
    ),
    Mutant(
        "last_word_is_a_token", "rewrites", "lora_fx/deltas/rewrites.py",
        "own = F.embedding((use.x - n).clamp",
        "own = F.embedding((use.x - n + 1).clamp",
        "Tokens are looked up one row too late.",
        tests=of_rewrites("tokens_stand_behind_the_last_one_of_the_table"),
    ),
    Mutant(
        "tokens_asked_of_the_table", "rewrites", "lora_fx/deltas/rewrites.py",
        "use.of(use.x.clamp(max=n - 1))",
        "use.of(use.x)",
        "The table is asked for rows that it does not have.",
        tests=of_rewrites("tokens_stand_behind_the_last_one_of_the_table"),
    ),
    Mutant(
        "tokens_start_as_noise", "rewrites", "lora_fx/deltas/rewrites.py",
        "rows.copy_(weight.index_select(-1, drawn).mT)",
        "rows.normal_()",
        "New tokens are no words that the model knows.",
        tests=of_rewrites("tokens_start_as_words_of_the_table"),
    ),
    Mutant(
        "nested_call_keeps_its_ids", "rewrites", "lora_fx/deltas/calls.py",
        '        self.inside, self.ids, self.asked, self.mixed = before',
        '        self.inside = before[0]',
        "A call inside of another leaves its ids to the blocks that come after it.",
        tests=of_prefixes("a_call_inside_of_a_call_and_one_that_fails_leave_the_outer_one_its_ids"),
    ),
    Mutant(
        "checkpoint_with_the_last_ids", "rewrites", "lora_fx/deltas/calls.py",
        '        known = None if is_dynamo_compiling() else self.flown.of(h)',
        '        known = next((ids for _, ids in reversed(self.flown._known.values())), None)',
        "What a backward runs again takes the ids of whichever block ran last.",
        tests=of_prefixes("a_checkpoint_runs_a_block_again_with_the_ids_of_its_own_call"),
    ),
    Mutant(
        "checkpoint_that_nobody_knows", "rewrites", "lora_fx/deltas/calls.py",
        '        if (key := _place(h)) is None:',
        '        if (key := None) is None:',
        "No block can be run again.",
        tests=of_prefixes("a_checkpoint_runs_a_block_again_with_the_ids_of_its_own_call"),
    ),
    Mutant(
        "ids_of_two_readings", "rewrites", "lora_fx/deltas/calls.py",
        '            self.mixed = self.mixed or not self.asked',
        '            self.mixed = False',
        "Of two readings of the table the last one is taken for the blocks'.",
        tests=of_prefixes("two_readings_before_a_block_are_refused"),
    ),
    Mutant(
        "new_ids_outside_of_a_call", "rewrites", "lora_fx/deltas/calls.py",
        '            if not again and not ids.is_meta and bool((ids >= words).any()):',
        '            if False:',
        "Embeddings of new tokens go into a model whose blocks know nothing of them.",
        tests=of_prefixes("ids_looked_up_outside_of_a_call_are_refused_where_some_are_new"),
    ),
    Mutant(
        "one_block_for_all", "rewrites", "lora_fx/deltas/rewrites.py",
        'range(len(space.settings.blocks.split(SEPARATOR)))}',
        'range(1)}',
        "Only one block gets trained activations.",
        tests=of_rewrites("each_system_trains_by_rules_alone_and_exactly_its_own"),
    ),
)  # fmt: skip
