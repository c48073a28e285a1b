"""What a row of the table of mutants is, and which tests are run against each area of the library."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Area:
    """What is run against the mutants of one part of the library, beside the laws over random models."""

    tests: tuple[str, ...]
    """pytest's arguments: files, or single tests of slow files."""
    zoo: str = ""
    """The architectures of the zoo whose laws (tests/test_laws.py) are run, joined by commas."""
    laws: str = ""
    """The laws that are run over random models (tests/test_random_laws.py), joined by commas."""


@dataclass(frozen=True)
class Mutant:
    """One defect."""

    name: str
    area: str
    file: str
    """Relative to the repository."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    what: str
    """The defect, in a sentence."""
    tests: tuple[str, ...] = ()
    """Instead of the area's."""
    zoo: str = ""
    """Instead of the area's."""
    laws: str = ""
    """Instead of the area's."""

    @property
    def module(self) -> str:
        """The name it is imported under."""
        path = self.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        return path if path.startswith("lora_fx") else f"lora_fx.{path}"

    @property
    def suite(self) -> Area:
        area = AREAS[self.area]
        return Area(self.tests or area.tests, self.zoo or area.zoo, self.laws or area.laws)

    def applied(self, source: str) -> str:
        """The source with the defect.

        Raises:
            ValueError: the text to replace does not occur exactly once.
        """
        times = source.count(self.old)
        if times != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {times} times, not once: mend this row")
        return source.replace(self.old, self.new)


GAPS = "tests/test_mutant_gaps.py"
KINDS = tuple(f"tests/{path.name}" for path in sorted(ROOT.glob("tests/test_kinds*.py")))


def of_sites(name: str) -> tuple[str, ...]:
    """The row of the table of operands with this name."""
    return (f"tests/test_sites.py::test_every_operand_that_comes_from_parameters_is_a_site[{name}]",)


def of_kinds(*names: str) -> tuple[str, ...]:
    """These tests of `KINDS`, without their ``test_``, each in the file where it stands."""
    return tuple(f"{_file_of(name)}::test_{name}" for name in names)


def _file_of(name: str) -> str:
    return next((file for file in KINDS if f"def test_{name}(" in _text(file)), KINDS[0])  # which lacks it, and says so


@functools.cache
def _text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


REWRITES = "tests/test_rewrites.py"


def of_rewrites(name: str) -> tuple[str, ...]:
    """This test of `REWRITES`, without its ``test_``."""
    return (f"{REWRITES}::test_{name}",)


def of_rewrite_checks(name: str) -> tuple[str, ...]:
    """This test of the check of rewrites, without its ``test_``."""
    return (f"tests/test_rewrite_check.py::test_{name}",)


COMBINE = "tests/test_combine.py"


def of_combine(name: str) -> tuple[str, ...]:
    """This test of `COMBINE`, without its ``test_``."""
    return (f"{COMBINE}::test_{name}",)


EXTRACT = "tests/test_extract.py"


def of_extract(name: str) -> tuple[str, ...]:
    """This test of `EXTRACT`, without its ``test_``."""
    return (f"{EXTRACT}::test_{name}",)


def of_principal(name: str) -> tuple[str, ...]:
    """This test of `tests/test_principal.py`, without its ``test_``."""
    return (f"tests/test_principal.py::test_{name}",)


def of_prefixes(name: str) -> tuple[str, ...]:
    """This test of what stands behind blocks, without its ``test_``."""
    return (f"tests/test_prefix_layer.py::test_{name}",)


HISTORIES = "tests/test_histories.py"
GRADIENTS = "tests/test_gradients.py"
INTERRUPTS = "tests/test_interrupts.py"
PAPER = "tests/test_paper.py"
MEMORY = "tests/test_memory.py"

CHECKPOINTS = "tests/test_checkpoints.py"
EXPERTS = "tests/test_checkpoints_experts.py"
BESIDE = "tests/test_checkpoints_beside.py"
COMMAND = "tests/test_command.py"

AREAS = {
    "algebra": Area((GAPS, "tests/test_forms.py"), "native-chain", "l2"),
    "layouts": Area((GAPS, "tests/test_views.py", "tests/test_forms.py"), "native-conv1d", "l2"),
    "wiring": Area((GAPS, "tests/test_graph_module.py"), "native-two-names", "l2"),
    "settings": Area(("tests/test_settings.py",)),
    "insert": Area((GAPS, "tests/test_refusals.py", "tests/test_rules.py"), "native-tied", "l6"),
    "capture": Area((GAPS, "tests/test_refusals.py"), "native-batchnorm", "l13"),
    "fold": Area(("tests/test_fold.py", "tests/test_rules.py", GAPS), "native-chain", "l3"),
    "rounding": Area(("tests/test_fold.py", GAPS), "native-chain", "l3"),
    "ahead": Area(("tests/test_fold.py",)),
    "unfold": Area(("tests/test_fold.py", "tests/test_rules.py", GAPS), "native-chain", "l5"),
    "changes": Area(("tests/test_concurrency.py",)),
    "switching": Area(("tests/test_switching.py",)),
    "passes": Area(("tests/test_pipeline.py",)),
    "roles": Area(("tests/test_roles.py",)),
    "sites": Area(("tests/test_sites.py", "tests/test_refusals.py")),
    "rules": Area(("tests/test_rules.py", GAPS)),
    "plan": Area(("tests/test_rules.py", "tests/test_refusals.py", GAPS)),
    "verification": Area((GAPS, "tests/test_refusals.py"), "native-tied", "l1"),
    "export": Area(("tests/test_onnx.py",), laws="l10"),
    "schedules": Area(("tests/test_schedules.py",)),
    "dropping": Area(("tests/test_dropping.py",)),
    "dispatch": Area(("tests/test_dispatch.py",)),
    "files": Area(("tests/test_adapter_files.py", GAPS)),
    "kinds": Area(KINDS),
    "histories": Area((HISTORIES,)),
    "places": Area(("tests/test_places.py",)),
    "gradients": Area((GRADIENTS,)),
    "paper": Area((PAPER,)),
    "memory": Area((MEMORY,)),
    "rewrites": Area((REWRITES,)),
    "checkpoints": Area((CHECKPOINTS, BESIDE, EXPERTS)),
    "command": Area((COMMAND,)),
}
