"""The adapted model, and two twins of it with plain parameters: what the histories of law L15 hold side by side.

    adapted   reads  W + δ  as lora_fx has it read
    dense     has W + Σ δ, computed from θ by plain torch, written into its parameters for as long as a forward lasts;
              its gradient of θ is the chain rule on its gradient of W. What rewrites activations is done to the results
              of the ops that take the weight, and behind blocks by hooks, from outside
    nudged    is dense with weights and inputs moved by `NUDGE` rounding steps: what moves with them is noise

Each lives in a world of its own: random states, and what its forward reads or writes outside of it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.checks.verification import Draws, dither
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.rewrites import Using
from lora_fx.graph.capture import Inputs
from lora_fx.graph.forms import find
from lora_fx.model.behind import blocks_of, hidden, with_hidden
from lora_fx.model.inventory import inventory

#: How many rounding steps the third life is moved by. One would do for tensors; a number that is a small sum of large
#: ones (a mean in a log) may by accident move by much less than it is uncertain. A lost branch, a frozen scale or a
#: gradient of the wrong sign is still a million bounds away.
NUDGE = 2.0**16

MARK = "_lora_fx"  # how what is ours begins, in the `__dict__` of a module
_RECORDS = f"{MARK}_dense"
_HELD = f"{MARK}_dense_folded"
_RATE = 1e-2


# ── the world outside of a model ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shared:
    """A state outside of the model that its forward reads or writes."""

    owner: Any
    """A list, a mapping, or an object with attributes."""
    names: tuple[str, ...] = ()
    """Which keys or attributes; not for a list."""


class World:
    """The random states, and what a model shares with others, as they are now."""

    def __init__(self, shared: Sequence[Shared]) -> None:
        self.torch, self.python, self.numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.shared = [(one, _read(one)) for one in shared]

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for one, values in self.shared:
            _write(one, values)

    def tree(self) -> dict[str, Any]:
        numpy: Any = self.numpy
        return {
            "torch_random_state": hash(self.torch.numpy().tobytes()),
            "python_random_state": hash(self.python),
            "numpy_random_state": hash((numpy[1].tobytes(), *numpy[2:])),
            "shared": [values for _, values in self.shared],
        }


_ABSENT = "(absent)"


def _read(one: Shared) -> Any:
    if isinstance(one.owner, list):
        return list(one.owner)
    if isinstance(one.owner, Mapping):
        return {name: copy.deepcopy(one.owner.get(name, _ABSENT)) for name in one.names}
    return {name: copy.deepcopy(getattr(one.owner, name, _ABSENT)) for name in one.names}


def _write(one: Shared, values: Any) -> None:
    if isinstance(one.owner, list):
        one.owner[:] = values
        return
    for name, value in values.items():
        if isinstance(one.owner, MutableMapping):
            if value == _ABSENT:
                one.owner.pop(name, None)
            else:
                one.owner[name] = copy.deepcopy(value)
        elif value == _ABSENT:
            with contextlib.suppress(AttributeError):
                delattr(one.owner, name)
        else:
            setattr(one.owner, name, copy.deepcopy(value))


# ── three lives ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Life:
    """The adapted model."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.kept: deque[Any] = deque(maxlen=2)
        """What the last calls returned: nobody may write to that."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, weights read as W + δ."""
        yield

    def inputs(self, inputs: Inputs) -> Inputs:
        return inputs

    def theta(self) -> dict[str, torch.Tensor]:
        """Every tensor of θ: weight, adapter and tensor → its numbers."""
        first = {place.adapter: place.weight for place in reversed(inventory(self.model).places)}
        named = [(weight, adapter, *own) for adapter, weight in first.items() for own in adapter.named_parameters()]
        return {f"{weight}: {adapter.name}.{name}": p for weight, adapter, name, p in named}

    def gradients(self) -> dict[str, torch.Tensor | None]:
        found = {name: None if p.grad is None else p.grad.detach().clone() for name, p in self.theta().items()}
        for parameter in self.model.parameters():
            parameter.grad = None
        return found

    def step(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Of plain gradient descent."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for name, p in self.theta().items():
            p.grad = gradients[name]
        if trained:
            torch.optim.SGD(trained, lr=_RATE).step()
        for p in self.theta().values():
            p.grad = None

    def freeze(self, tensor: str, frozen: bool) -> None:
        """What the user says of each tensor of θ of this name, where it acts."""
        for adapter in inventory(self.model).adapters:
            if adapter.active and tensor in adapter._parameters:
                adapter.get_parameter(tensor).requires_grad_(not frozen)

    def scale(self, factor: float) -> None:
        for adapter in inventory(self.model).adapters:
            if "alpha" in adapter.settings:
                adapter.alpha *= factor

    def convert(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)

    def load(self, share: float, theta: bool, assign: bool) -> None:
        """All floating numbers of the state_dict are `share` as large."""
        own = {id(p) for p in self.theta().values()}
        current = self.model.state_dict(keep_vars=True)
        state = {k: _shared_out(v, share) for k, v in current.items() if theta or id(v) not in own}
        missing = self.model.load_state_dict(state, strict=theta, assign=assign)
        assert not missing.unexpected_keys, missing


def _shared_out(value: Any, share: float) -> Any:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach() * share if floats else value.detach().clone() if isinstance(value, torch.Tensor) else value


@dataclass
class _Record:
    """θ of one adapter in the dense life, and the weights that it is of. It shares no code with branches and folds."""

    name: str
    owners: list[tuple[nn.Module, str]]
    layout: tuple[str, tuple[int, ...]]
    rows: tuple[int, ...] | None
    scale: float
    tensors: dict[str, torch.Tensor]
    other: Adapter | None
    """Of a kind that is no product of factors: a copy, asked for what its kind says δ is."""
    blocks: list[tuple[nn.Module, str]]
    """Behind which it stands, with the tensor of θ for each."""
    lent: dict[str, _Record] = field(default_factory=dict)
    """Tensors of θ that another one of its name has, for both."""
    active: bool = True
    strength: float = 1.0
    trained: tuple[str, ...] = ()
    """While it does not act: which tensors did train, and will."""

    @classmethod
    def of(cls, adapter: Adapter, owners: list[tuple[nn.Module, str]], blocks: list[tuple[nn.Module, str]]) -> _Record:
        tensors = {
            n: p.detach().clone().requires_grad_(n not in adapter.kind.frozen) for n, p in adapter.named_parameters()
        }
        factors = adapter.kind.name == "lora"
        scale = (
            adapter.alpha / (math.sqrt(adapter.rank) if adapter.scaling == "rslora" else adapter.rank) if factors else 1
        )
        other = None if factors else copy.deepcopy(adapter)
        layout = adapter.layout.sides, adapter.layout.shape
        return cls(adapter.name, owners, layout, adapter.rows, scale, tensors, other, blocks)

    @property
    def new_ids(self) -> int:
        """How many ids it takes behind the last one of its table."""
        return 0 if self.other is None else self.other.kind.new_ids(self.other.settings)

    @property
    def rewrites(self) -> bool:
        """It is no delta of the weight."""
        return self.other is not None and not self.other.kind.is_delta

    def tensor(self, name: str) -> torch.Tensor:
        return self.lent[name].tensors[name] if name in self.lent else self.tensors[name]

    def act(self, strength: float) -> None:
        """θ of what does not act, at strength 0, does not train; of what acts again it trains as it did."""
        whether, self.strength = strength != 0, strength
        if whether != self.active:
            self.active = whether
            names = self.trained if whether else tuple(n for n, t in self.tensors.items() if t.requires_grad)
            for name in names:
                self.tensors[name].requires_grad_(whether)
            self.trained = names

    def renew(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Other numbers, or numbers of another dtype; what trains is the same."""
        self.tensors = {n: change(t.detach()).requires_grad_(t.requires_grad) for n, t in self.tensors.items()}

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """In the weight's own axes; differentiable in θ."""
        if self.other is not None:
            return self.strength * self.other.delta(weight, self.other.theta_of(self.tensors))
        sides, shape = self.layout
        matrix = self.strength * self.scale * (self.tensors["B"] @ self.tensors["A"])
        order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
        if self.rows is not None:
            outputs = math.prod(shape[k] for k, side in enumerate(sides) if side == "o")
            whole = matrix.new_zeros(*matrix.shape[:-2], outputs, matrix.shape[-1])
            matrix = whole.index_copy(-2, torch.tensor(self.rows), matrix)
        return matrix.reshape([shape[k] for k in order]).permute([order.index(k) for k in range(len(order))])


class Dense(Life):
    """The same model with plain parameters, which hold W + δ while a forward runs.

    Args:
        nudge: how many rounding steps its weights and inputs are moved by.
    """

    def __init__(self, model: nn.Module, world: World, nudge: float) -> None:
        super().__init__(model, world)
        self.nudge = nudge
        self._bases: list[tuple[nn.Parameter, torch.Tensor]] = []
        """While a forward runs: parameters, and the W that they hold otherwise."""

    @property
    def folded(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Parameters that hold W + δ for longer, and W. In the model, so that copies have it."""
        return self.model.__dict__.setdefault(_HELD, [])

    @property
    def records(self) -> list[_Record]:
        """Those whose weights are in the model still."""
        here = set(self.model.modules())
        found = self.model.__dict__.setdefault(_RECORDS, [])
        return [record for record in found if any(owner in here for owner, _ in record.owners)]

    def adopt(self, adapted: nn.Module, name: str) -> None:
        """Take over an adapter as it starts."""
        self.model.requires_grad_(False)
        owners: dict[Adapter, list[tuple[nn.Module, str]]] = {}
        here = inventory(adapted)
        for place in here.places:
            if place.adapter.name == name:
                owners.setdefault(place.adapter, []).append((self.model.get_submodule(place.path), place.attribute))
        new = dict[Adapter, _Record]()
        for adapter, own in owners.items():
            found = blocks_of(adapter, here.modules).items()
            blocks = [(self.model.get_submodule(here.modules[block][0]), tensor) for tensor, block in found]
            new[adapter] = _Record.of(adapter, own, blocks)
        for adapter, record in new.items():
            record.lent |= {t: new[adapter.owner(t)] for t in adapter.tensors if adapter.owner(t) is not adapter}
        self.model.__dict__[_RECORDS] = [*self.records, *new.values()]

    def take(self, theirs: Mapping[str, torch.Tensor], name: str, numbers: Mapping[str, torch.Tensor]) -> None:
        """The numbers of θ that a file had for an adapter; what it had none for, as it is there."""
        own = {id(tensor): key for key, tensor in self.theta().items()}
        for record in (record for record in self.records if record.name == name):
            keys = {n: own[id(tensor)] for n, tensor in record.tensors.items()}
            record.tensors = {
                n: numbers.get(keys[n], theirs[keys[n]]).detach().clone().requires_grad_(tensor.requires_grad)
                for n, tensor in record.tensors.items()
            }

    def started(
        self, name: str, numbers: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Of the deltas that a file had no numbers for: the weight's name, W and δ, which is zero but for rounding."""
        own = {id(tensor): key for key, tensor in self.theta().items()}
        for record in (record for record in self.records if record.name == name and not record.rewrites):
            keys = [own[id(tensor)] for tensor in record.tensors.values()]
            if not any(key in numbers for key in keys):
                owner, attribute = record.owners[0]
                weight = owner._parameters[attribute]
                assert weight is not None
                yield keys[0].partition(":")[0], weight.detach(), record.delta(weight.detach()).detach()

    def activate(self, strengths: Mapping[str, float]) -> None:
        for record in self.records:
            record.act(strengths.get(record.name, 0.0))

    def freeze(self, tensor: str, frozen: bool) -> None:
        for record in self.records:
            if record.active and tensor in record.tensors:
                record.tensors[tensor].requires_grad_(not frozen)

    def scale(self, factor: float) -> None:
        for record in self.records:
            record.scale *= factor
            if record.other is not None and "alpha" in record.other.settings:
                record.other.alpha *= factor

    def remove(self, name: str) -> None:
        self.model.__dict__[_RECORDS] = [record for record in self.records if record.name != name]

    def _weights(self) -> list[tuple[list[nn.Parameter], list[_Record]]]:
        """Parameters that hold one weight, with what acts on it."""
        found: dict[int, tuple[list[nn.Parameter], list[_Record]]] = {}
        for record in (record for record in self.records if not record.rewrites):
            for owner, attribute in record.owners:
                parameter = owner._parameters[attribute]
                assert parameter is not None, attribute
                parameters, acting = found.setdefault(parameter.data_ptr(), ([], []))
                if not any(parameter is p for p in parameters):
                    parameters.append(parameter)
                if record.active and not any(record is r for r in acting):
                    acting.append(record)
        return [(parameters, acting) for parameters, acting in found.values() if acting]

    def _sum(self, base: torch.Tensor, acting: Sequence[_Record]) -> torch.Tensor:
        with torch.no_grad():
            total = base.to(torch.float64)
            for record in acting:
                total = total + record.delta(base).to(torch.float64)
            return self.moved(total, base.dtype).to(base.dtype)

    def moved(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self.nudge:
            return values
        step = torch.finfo(dtype).eps * (self.nudge / 2 if dtype == torch.float64 else 1.0)
        return values * dither(values, step, Draws(1)).to(values.dtype)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        if self.folded:
            yield
            return
        self._bases = []
        for parameters, acting in self._weights():
            base = parameters[0].detach().clone()
            trains = any(tensor.requires_grad for record in acting for tensor in record.tensors.values())
            for parameter in parameters:
                self._bases.append((parameter, base))
                parameter.data.copy_(self._sum(base, acting))
                parameter.requires_grad_(trains)
        rewriting = _Rewriting([r for r in self.records if r.rewrites and r.active], self.moved)
        try:
            with rewriting.behind_blocks(), rewriting if rewriting.records else contextlib.nullcontext():
                yield
        finally:
            for parameter, base in self._bases:
                parameter.data.copy_(base)
                parameter.requires_grad_(False)
            self._bases = []

    def inputs(self, inputs: Inputs) -> Inputs:
        def moved(value: Any) -> Any:
            floats = isinstance(value, torch.Tensor) and value.is_floating_point()
            return self.moved(value, value.dtype) if floats else value

        return mapped(inputs, moved)

    def theta(self) -> dict[str, torch.Tensor]:
        if self.folded:
            return {}
        paths = {module: path for path, module in self.model.named_modules()}
        order = {module: k for k, module in enumerate(paths)}
        found = {}
        for record in self.records:
            owner, attribute = min(record.owners, key=lambda own: order.get(own[0], len(order)))
            weight = f"{paths[owner]}.{attribute}".lstrip(".")
            found.update({f"{weight}: {record.name}.{name}": t for name, t in record.tensors.items()})
        return found

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """By the chain rule from the gradient of the dense weight."""
        theta = self.theta()
        found: dict[str, torch.Tensor | None] = dict.fromkeys(theta)
        names = {id(tensor): name for name, tensor in theta.items()}
        for tensor in (t for record in self.records if record.rewrites for t in record.tensors.values()):
            found[names[id(tensor)]], tensor.grad = tensor.grad, None
        for parameters, acting in self._weights():
            own = [p.grad for p in parameters if p.grad is not None]
            (base,) = [base for p, base in self._bases if p is parameters[0]]
            for record in acting if own else ():
                tensors = [tensor for tensor in record.tensors.values() if tensor.requires_grad]
                if not tensors:
                    continue
                with torch.enable_grad():
                    delta = record.delta(base)
                grads = torch.autograd.grad(
                    delta, tensors, sum(own[1:], start=own[0]).to(delta.dtype), allow_unused=True
                )
                for tensor, gradient in zip(tensors, grads, strict=True):
                    before = found[names[id(tensor)]]  # of a weight that it was tied to
                    found[names[id(tensor)]] = gradient if before is None else before + gradient
        for parameter in self.model.parameters():
            parameter.grad = None
        return found

    def step(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        with torch.no_grad():
            for name, tensor in self.theta().items():
                gradient = gradients[name]
                if gradient is not None:
                    tensor -= _RATE * gradient

    def convert(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        for record in self.records:
            if record.other is not None:
                record.other.to(dtype)
            record.renew(lambda tensor: tensor.to(dtype))

    def load(self, share: float, theta: bool, assign: bool) -> None:
        state = {name: _shared_out(value, share) for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, assign=assign)
        self.model.requires_grad_(False)
        for record in self.records if theta else ():
            record.renew(lambda tensor: tensor * share)

    def fold(self) -> None:
        for parameters, acting in self._weights():
            base = parameters[0].detach().clone()
            for parameter in parameters:
                self.folded.append((parameter, base))
                parameter.data.copy_(self._sum(base, acting))

    def unfold(self) -> None:
        for parameter, base in self.folded:
            parameter.data.copy_(base)
        self.folded.clear()


class _Rewriting(TorchFunctionMode):
    """Inside, the result of each op that takes one of these weights is rewritten as its records say, in their order."""

    def __init__(self, records: list[_Record], moved: Callable[[torch.Tensor, torch.dtype], torch.Tensor]) -> None:
        super().__init__()
        self.records, self.moved = records, moved
        self.ids: dict[int, torch.Tensor] = {}
        """Of each record that stands behind blocks: what its table was read with last."""

    @contextlib.contextmanager
    def behind_blocks(self) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for record in self.records:
                for block, tensor in record.blocks:
                    hook = block.register_forward_hook(partial(self._behind, record, tensor), prepend=True)
                    hooks.callback(hook.remove)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        acting: list[_Record] = []
        found = find(func, args, kwargs, lambda own: own.ndim if self._acting(own) else None)
        if found is not None:
            acting = [r for r in self._acting(found.weight) if not r.new_ids or found.form.looks_up]
        if found is None or not acting:
            return func(*args, **kwargs)

        def use(x: torch.Tensor) -> torch.Tensor:
            operands = [x if value is found.x else value for value in args]
            return func(*operands, **{k: x if value is found.x else value for k, value in kwargs.items()})

        for record in sorted(acting, key=lambda r: not r.blocks):  # inside of who wants to see new ids
            if record.blocks:
                self.ids[id(record)] = found.x
            use = partial(self._around, record, use)
        return use(found.x)

    def _acting(self, operand: Any) -> list[_Record]:
        return [r for r in self.records if any(operand is m._parameters.get(name) for m, name in r.owners)]

    def _around(self, record: _Record, use: Callable[[Any], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        other: Any = record.other
        dtypes = {name: self._own(record, name, other.dtype) for name in other.tensors}
        return other.kind.around(Using(x, use, other.space), other.theta_of(dtypes))

    def _own(self, record: _Record, tensor: str, dtype: torch.dtype) -> torch.Tensor:
        return self.moved(record.tensor(tensor), dtype)

    def _behind(self, record: _Record, tensor: str, block: nn.Module, args: Any, output: Any) -> Any:
        ids, h = self.ids.get(id(record)), hidden(output)
        if ids is None:
            return None
        n = record.layout[1][0]
        rows = self._own(record, tensor, h.dtype)[(ids - n).clamp(min=0)]
        return with_hidden(output, torch.where((ids < n).unsqueeze(-1), h, rows))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Inputs):
        return Inputs(mapped(value.args, change), mapped(value.kwargs, change))
    if isinstance(value, tuple):
        return tuple(mapped(v, change) for v in value)
    if isinstance(value, list):
        return [mapped(v, change) for v in value]
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return change(value)
