"""Defects of `lora_fx`."""

from __future__ import annotations

from tests.mutants.table import INTERRUPTS, Mutant

ROWS = (
    # ── tracing and wiring ───────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "refusal_leaves_the_weights_frozen", "insert", "lora_fx/changes.py",
        "parameter.requires_grad_(was)", "pass",
        "After a refused apply the base weights do not train any more.",
    ),
    Mutant(
        "refusal_leaves_the_adapters", "insert", "lora_fx/changes.py",
        "for table, was in tables:", "for table, was in ():",
        "After a refused apply the adapters are still there.",
    ),
    # ── changes: wholly or not at all, while the model rests ─────────────────────────────────────────────────────────
    Mutant(
        "changed_while_it_runs", "changes", "lora_fx/changes.py",
        "        _refuse_running(model, verb)\n", "",
        "A verb changes a model that another thread is running.",
    ),
    Mutant(
        "numbers_not_rolled_back", "changes", "lora_fx/changes.py",
        "                _roll_back(undo)\n", "",
        "A fold that runs out of memory leaves the weights that it has written.",
        tests=("tests/test_faults.py::test_no_memory_at_any_operation_leaves_the_model_bitwise_what_it_was",),
    ),
    Mutant(
        "signals_do_not_wait", "changes", "lora_fx/changes.py",
        "        if not _signals.waits:\n            self.handler", "        if True:\n            self.handler",
        "Ctrl-C comes wherever a verb is, and leaves torch patched.",
        tests=(f"{INTERRUPTS}::test_signals_wait_for_the_end_of_the_outermost_block_and_come_in_their_order",),
    ),
    Mutant(
        "a_later_signal_is_lost", "changes", "lora_fx/changes.py",
        "        _let_in(due[1:], frame)\n", "        pass\n",
        "Of two signals that wait the handler of one runs.",
        tests=(f"{INTERRUPTS}::test_no_exception_is_lost",),
    ),
    Mutant(
        "a_timeout_is_the_models_own_error", "changes", "lora_fx/changes.py",
        "            raise _Passing(error) from error\n", "            raise\n",
        "What a timer's handler raises in a capture is taken for an error of the model.",
        tests=(f"{INTERRUPTS}::test_what_a_handler_raises_is_not_taken_for_the_models_own_error",),
    ),
    Mutant(
        "profiler_in_c_taken_out", "changes", "lora_fx/changes.py",
        "TRACER if TRACER.read() is None or written_in_c else PROFILER", "PROFILER",
        "After an apply inside cProfile every call fails.",
        tests=("tests/test_tracing.py::test_a_profiler_in_c_goes_on_after_the_calls_were_seen",),
    ),
    Mutant(
        "gradient_mode_left_off", "changes", "lora_fx/changes.py",
        "            switch.turn(was)\n", "            pass\n",
        "After Ctrl-C in a verb nothing has gradients any more.",
        tests=("tests/test_faults.py::test_an_exception_leaves_torchs_switches_as_they_were",),
    ),
)  # fmt: skip
