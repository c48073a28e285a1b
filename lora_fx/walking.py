"""The modules of a model, in torch's order, at a tenth of the cost: a verb asks often, of thousands of them."""

from __future__ import annotations

from torch import nn


def paths_of(model: nn.Module, leaves: type[nn.Module] | tuple[()] = ()) -> list[tuple[str, nn.Module]]:
    """`model.named_modules(remove_duplicate=False)` as a list: each module under each of its paths.

    Args:
        leaves: what is in modules of this class is left out.
    """
    found: list[tuple[str, nn.Module]] = []
    todo = [("", model)]
    while todo:
        here = path, module = todo.pop()
        found.append(here)
        if module._modules and not isinstance(module, leaves):
            prefix = f"{path}." if path else ""
            below = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            todo += below[::-1]
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` as a list: each module once."""
    found: dict[int, nn.Module] = {}
    todo = [model]
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                todo += [child for child in module._modules.values() if child is not None][::-1]
    return list(found.values())
