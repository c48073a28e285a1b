"""Defects of `lora_fx/cli`."""

from __future__ import annotations

from tests.mutants.table import COMMAND, Mutant

ROWS = (
    # ── the paper: directions, subspaces, table 7, the command line ──────────────────────────────────────────────────
    Mutant(
        "a_refusal_is_success", "paper", "lora_fx/cli/lazy.py",
        "context.exit(REFUSED)", "context.exit(0)",
        "A command that refuses ends with exit code 0.",
    ),
    Mutant(
        "help_waits_for_torch", "paper", "lora_fx/cli/lazy.py",
        "import click\n", "import click\nimport torch\n",
        "The help of the command line imports torch.",
        tests=("tests/test_demo.py::test_it_answers_without_torch",),
    ),
    # ── checkpoints on disk ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "wrong_is_done", "command", "lora_fx/cli/lazy.py",
        "REFUSED, FAILED, INTERRUPTED = 2, 3, 130", "REFUSED, FAILED, INTERRUPTED = 2, 0, 130",
        "What is looked at and found wrong ends with 0.",
    ),
    Mutant(
        "a_path_with_a_sign", "command", "lora_fx/cli/checkpoints.py",
        "if not path or Path(text).exists():", "if not path:",
        "A folder that has a = in its name is taken for a strength.",
        tests=(f"{COMMAND}::test_a_strength_comes_after_the_last_sign",),
    ),
    Mutant(
        "a_glob_is_a_number", "command", "lora_fx/cli/given.py",
        "for kind in (int, float) if key in _NUMBERS else ():", "for kind in (int, float):",
        "where=0 on the command line is the number 0, which is no glob.",
        tests=(f"{COMMAND}::test_models_by_json",),
    ),
    Mutant(
        "help_imports_torch", "command", "lora_fx/cli/checkpoints.py",
        "from lora_fx.cli.lazy import FAILED\n", "import torch\nfrom lora_fx.cli.lazy import FAILED\n",
        "A command imports torch to print its help.",
        tests=(f"{COMMAND}::test_help_has_an_example_of_each_and_needs_no_torch",),
    ),
    Mutant(
        "the_last_strength_counts", "command", "lora_fx/cli/checkpoints.py",
        "        if path in each:\n", "        if False:\n",
        "An adapter that is given twice is folded once, without a word.",
        tests=(f"{COMMAND}::test_what_is_refused_ends_with_2",),
    ),
    Mutant(
        "a_full_disk_ends_in_120", "command", "lora_fx/cli/shown.py",
        "        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())\n", "",
        "Where stdout is full, Python fails once more at its end, and another exit code says so.",
        tests=(f"{COMMAND}::test_json_is_json_and_a_reader_may_go",),
    ),
    Mutant(
        "json_with_nan", "command", "lora_fx/cli/shown.py",
        "json.dumps(_finite(said), indent=1, allow_nan=False)", "json.dumps(said, indent=1)",
        "--json prints NaN, which is no JSON.",
        tests=(f"{COMMAND}::test_json_is_json_and_a_reader_may_go",),
    ),
    Mutant(
        "rules_beside_a_file_are_dropped", "command", "lora_fx/cli/given.py",
        "if file is not None and texts:", "if False:",
        "--rule beside --rules is left out without a word.",
        tests=(f"{COMMAND}::test_what_is_refused_ends_with_2",),
    ),
    Mutant(
        "adapter_file_called_checkpoint", "command", "lora_fx/cli/inspecting.py",
        "    if place.is_file() and any", "    if False and any",
        "inspect calls a single adapter file a checkpoint.",
        tests=(f"{COMMAND}::test_checkpoints_by_json",),
    ),
)  # fmt: skip
