"""pytest against a mutant (`-p tests.mutants.plugin`): few architectures of the zoo, Hypothesis without shrinking."""

from __future__ import annotations

from typing import Any

from tests.mutants import hook

hook.install()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--zoo", default="", help="of tests/test_laws.py, only these architectures, joined by commas")
    parser.addoption("--laws", default="", help="of tests/test_random_laws.py, only these: l2,l13")


def pytest_configure(config: Any) -> None:
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "mutants", settings(), derandomize=True, deadline=None, database=None, max_examples=25,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    settings.load_profile("mutants")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    zoo, laws = config.getoption("--zoo").split(","), config.getoption("--laws").split(",")
    kept = [item for item in items if _architecture(item) in ("", *zoo) and _random_law(item) in ("", *laws)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _architecture(item: Any) -> str:
    """The zoo's name for what a law is tested on, and the kind of its adapters where that is not `lora`: "bert-dora".
    Empty for any other test."""
    case, kind = (getattr(item, "callspec", None) and item.callspec.params.get("adapted")) or (None, "lora")
    return getattr(case, "name", "") + ("" if kind == "lora" else f"-{kind}")


def _random_law(item: Any) -> str:
    """``l2`` for a law over random models; empty for any other test."""
    return item.name.split("_")[1] if item.path.name == "test_random_laws.py" else ""
