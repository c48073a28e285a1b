"""Small random-weight architectures with the role of every weight, written down by a person.

A case is a row: how to build the model, and what each of its weights does. The labels come from reading the source
of the model, never from running lora_fx, so that they can prove it wrong. `import tests.zoo` is fast: transformers
is imported by the first `build()` that needs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Parts:
    """A fused weight: role -> the output features (0-based rows of the projection) that have it, ascending."""

    rows: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture.

    `build()` gives a fresh model (eval, float32) and its inputs (a tensor, a tuple or a dict); the same bits each time.
    `roles` maps globs over parameter names to roles, first match wins; None says that nothing multiplies with or looks
    up in a parameter of two or more dimensions (an added table, a token, a gathered bias, half of a computed weight).
    `may_abstain` holds globs of weights whose role a person sees, and for which `other` is acceptable all the same.
    `earlier` are the roles under the names that versions of its package gave the parameters before those of `roles`.
    """

    name: str
    family: str
    build: Callable[[], tuple[nn.Module, Any]]
    roles: Mapping[str, str | Parts | None]
    may_abstain: frozenset[str] = frozenset()
    earlier: Mapping[str, str | Parts | None] | None = None


def fused(*blocks: tuple[str, int], times: int = 1) -> Parts:
    """The parts of a weight whose output features are these (role, size) blocks in a row, all of it `times` over."""
    roles = [role for role, size in blocks for _ in range(size)] * times
    return Parts({role: tuple(i for i, r in enumerate(roles) if r == role) for role in dict.fromkeys(roles)})


def fresh(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    """`make` as a `Case.build`: seeded, the global random state restored, every parameter drawn anew, in eval mode."""

    def build() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model, inputs = make()
            _redraw(model.eval())
            _calibrate(model, inputs)
        return model, inputs

    return build


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on the inputs of its case."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@torch.no_grad()
def _redraw(model: nn.Module) -> None:
    """Matrices of std 1/sqrt(fan_in), vectors moved a little: no signal vanishes and no zero bias hides a bug."""
    convs = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    for weight in model.parameters():
        if weight.ndim < 2:
            weight.add_(torch.randn_like(weight), alpha=0.1)
        else:
            weight.normal_(std=(weight[0].numel() if id(weight) in convs else weight.shape[-1]) ** -0.5)


@torch.no_grad()
def _calibrate(model: nn.Module, inputs: Any) -> None:
    """Batch statistics near those of the inputs, so that no channel is dead, but not equal: an update must show."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    call(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        norm.running_mean.add_(torch.randn_like(norm.running_mean), alpha=0.1)
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4))


def case(name: str) -> Case:
    """The case of that name."""
    for found in ZOO:
        if found.name == name:
            return found
    raise KeyError(f"no case {name!r} in the zoo; it has {', '.join(c.name for c in ZOO)}")


def expected_roles(case: Case, model: nn.Module) -> dict[str, str | Parts]:
    """Parameter name -> role, for every weight of the model and under each of its names.

    Every glob must win somewhere, and every parameter of two or more dimensions must have a row (None if no weight).
    """
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    roles = case.roles
    if case.earlier is not None and not all(_any(names, glob) for glob in roles):
        roles = case.earlier
    winner = {name: next((g for g in roles if fnmatchcase(name, g)), None) for name in names}
    missing = [name for name in names if winner[name] is None]
    assert not missing, f"{case.name}: no role for {missing}; add a row to its roles"
    idle = [*(set(roles) - set(winner.values())), *(g for g in case.may_abstain if not _any(names, g))]
    assert not idle, f"{case.name}: {idle} match no parameter of two or more dimensions; it has {names}"
    return {name: role for name in names if (role := roles[winner[name]]) is not None}


def _any(names: list[str], glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


from tests.zoo import native_models, transformers_models  # noqa: E402  (they import Case and its helpers from here)

ZOO: tuple[Case, ...] = native_models.CASES + transformers_models.CASES
assert len({c.name for c in ZOO}) == len(ZOO), "two cases of one name"
