"""Defects of `lora_fx/testing`."""

from __future__ import annotations

from tests.mutants.table import HISTORIES, Mutant, of_kinds

ROWS = (
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "kinds_not_drawn", "kinds", "lora_fx/testing/strategies.py",
        "        kind = draw(st.sampled_from(kinds))\n        fitting", '        kind = "lora"\n        fitting',
        "The laws of a kind are laws of `lora`.",
        tests=of_kinds("rules_and_theta_are_drawn_for_the_kind"),
    ),
    Mutant(
        "drawn_theta_at_its_start", "kinds", "lora_fx/testing/strategies.py",
        "                scatter(adapter, place.parameter, generator, self.size)\n                continue",
        "                continue",
        "The laws of a kind are tried where its δ is 0.",
        tests=of_kinds("rules_and_theta_are_drawn_for_the_kind"),
    ),
    # ── histories: what holds a model against its dense twin ─────────────────────────────────────────────────────────
    Mutant(
        "histories_forgive", "histories", "lora_fx/testing/agreement.py",
        "        return SLACK * max(noise_floor(b, moved), least)\n", "        return 1.0\n",
        "A history may be off by as much as there is.",
        tests=(f"{HISTORIES}::test_a_defect_in_a_history_is_found_and_named[a buffer]",),
    ),
    Mutant(
        "histories_weights_give_way", "histories", "lora_fx/testing/agreement.py",
        "untouched = isinstance(b, nn.Parameter) and not self.folded", "untouched = False",
        "A base weight may move by rounding.",
        tests=(f"{HISTORIES}::test_a_defect_in_a_history_is_found_and_named[a changed weight]",),
    ),
    Mutant(
        "histories_gradients_unasked", "histories", "lora_fx/testing/agreement.py",
        "(a.dtype, a.shape, a.requires_grad) != (b.dtype, b.shape, b.requires_grad)",
        "(a.dtype, a.shape) != (b.dtype, b.shape)",
        "Whether a tensor has a gradient is not compared.",
        tests=(f"{HISTORIES}::test_a_defect_in_a_history_is_found_and_named[a lost gradient]",),
    ),
    Mutant(
        "histories_outputs_forgotten", "histories", "lora_fx/testing/histories.py",
        "    life.kept.append(output)\n", "",
        "What an earlier call returned may be written to.",
        tests=(f"{HISTORIES}::test_an_output_that_a_later_call_writes_to_is_found",),
    ),
    Mutant(
        "dense_twin_is_the_base", "histories", "lora_fx/testing/twins.py",
        "                total = total + record.delta(base).to(torch.float64)\n", "                pass\n",
        "The dense twin has no δ in its weights.",
        tests=(f"{HISTORIES}::test_every_kind_of_step_in_one_history",),
    ),
    Mutant(
        "dense_twin_trains_nothing", "histories", "lora_fx/testing/twins.py",
        "                    tensor -= _RATE * gradient\n", "                    pass\n",
        "θ of the dense twin stays where it is.",
        tests=(f"{HISTORIES}::test_every_kind_of_step_in_one_history",),
    ),
    Mutant(
        "twin_without_its_blocks", "histories", "lora_fx/testing/twins.py",
        '                for block, tensor in record.blocks:',
        '                for block, tensor in ():',
        "The dense twin leaves out what stands behind blocks.",
        tests=("tests/test_histories.py::test_a_history_of_what_stands_behind_blocks",),
    ),
)  # fmt: skip
