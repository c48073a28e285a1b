"""Law L15, histories: a model and its dense twins live through the same calls, steps and changes, and agree after each.

Outputs, gradients, θ, buffers, attributes, containers, logs, exceptions, and the random states of torch, Python and
numpy are compared. `histories` makes a Hypothesis state machine of a model, for whoever wants to hold their own to it.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import sys
import tempfile
import types
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn

import lora_fx
from lora_fx.analysis.rules import Rule
from lora_fx.checks.verification import cast_inputs
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import kind_named
from lora_fx.errors import LoraFxError
from lora_fx.export.adapters.files import held_of
from lora_fx.export.adapters.folder import VERSION, write_folder
from lora_fx.export.adapters.own import as_own
from lora_fx.graph.capture import Inputs, normalize_inputs
from lora_fx.model.inventory import inventory
from lora_fx.testing.agreement import Comparison
from lora_fx.testing.strategies import Filling
from lora_fx.testing.twins import NUDGE, Dense, Life, Shared, World, mapped

EVERYTHING = Rule(
    when=lambda site: not site.weight.problem and min(site.in_features, site.out_features) > 1, rank=2, alpha=3
)


# ── the acts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C, at a known place."""


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: BaseException | None = None

    @property
    def tree(self) -> dict[str, Any]:
        return {"returned": self.value, "raised": type(self.error).__name__ if self.error else None}


def _floats(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(_plain(value), lambda v: found.append(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else None)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain({f.name: getattr(value, f.name) for f in fields(value)}) if is_dataclass(value) else value


def _call(life: Life, inputs: Inputs, gradients: str) -> Any:
    modes: dict[str, Any] = {"on": torch.enable_grad, "off": torch.no_grad, "inference": torch.inference_mode}
    with life.reading(), modes[gradients]():
        output = life.inputs(inputs).call(life.model)
    life.kept.append(output)
    return output


def _train_step(life: Life, inputs: Inputs) -> Any:
    """One step of gradient descent on a loss in which each number of the outputs has its own share."""

    def leaf(value: Any) -> Any:
        return (
            value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        )

    own = mapped(life.inputs(inputs), leaf)
    with life.reading():
        output = own.call(life.model)
        losses = [_loss(y) for y in _floats(output) if y.requires_grad]
        if losses:
            sum(losses[1:], start=losses[0]).backward()
        theta = life.gradients()
    life.step(theta)
    of_inputs = [x.grad for x in (*own.args, *own.kwargs.values()) if isinstance(x, torch.Tensor)]
    return {"outputs": output, "gradient of the inputs": of_inputs, "gradient of θ": theta}


def _loss(y: torch.Tensor) -> torch.Tensor:
    """Its gradient is bounded: no history of training steps leads out of what float64 can hold."""
    share = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return (y.atan() * share).sum()


def _double_output(module: nn.Module, args: Any, output: Any) -> Any:
    return mapped(output, lambda v: v * 1.5 if isinstance(v, torch.Tensor) and v.is_floating_point() else v)


def _shift_input(module: nn.Module, args: Any) -> Any:
    return mapped(args, lambda v: v + 0.25 if isinstance(v, torch.Tensor) and v.is_floating_point() else v)


def _scale_gradient(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return mapped(grad_input, lambda v: v * 3 if isinstance(v, torch.Tensor) else v)


_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(_double_output),
    "forward_pre": lambda module: module.register_forward_pre_hook(_shift_input),
    "full_backward": lambda module: module.register_full_backward_hook(_scale_gradient),
}


def _interrupted(module: nn.Module, args: Any, output: Any) -> Any:
    raise _Interrupt


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _drawn(names: Callable[[Any], Sequence[Any]]) -> st.SearchStrategy[Any]:
    """One of what the machine has."""
    return st.runner().flatmap(lambda machine: st.sampled_from(list(names(machine))))


_WHICH = _drawn(lambda machine: range(len(machine.examples)))
_THEN = st.none() | _WHICH
_SEED = st.integers(0, 7)
_MODULE = _drawn(lambda machine: [name for name, _ in machine.dense.model.named_modules()])


class Histories(RuleBasedStateMachine):
    """A state machine of one model. Made by `histories`."""

    make: ClassVar[Callable[[], nn.Module]]
    examples: ClassVar[Sequence[Any]]
    changes: ClassVar[Mapping[str, Callable[[nn.Module], Any]]]
    shared: ClassVar[Sequence[Shared]]
    rules_: ClassVar[Any]
    checked: ClassVar[bool] = False
    """Adapters come with the self-check only: what it finds out is needed."""
    counts: ClassVar[Counter[str]]
    """Steps, histories, and what was refused on the way, since the machine was made."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = World(self.shared)
        self.lives: list[Life] = []
        self.names: list[str] = []
        self.active: list[str] = []
        self.isfolded = False

    # What happens

    @initialize(check=st.booleans(), training=st.booleans(), seed=_SEED)
    def apply(self, check: bool, training: bool, seed: int) -> None:
        """Three equal models; one is adapted, and nothing else of it or around it has changed."""
        self.counts["histories"] += 1
        models = [self._made(training) for _ in range(3)]
        self.lives = [Life(*models[0]), Dense(*models[1], nudge=0.0), Dense(*models[2], nudge=NUDGE)]
        self._agree({"as made": [life.model for life in self.lives]}, "make() does not give the same model twice: ")
        adapted = self.lives[0]
        objects, before = _objects(adapted.model), adapted.world
        adapted.model.requires_grad_(False)
        self._insert("default", self.rules_, check)
        for life in (self.dense, self.nudged):
            life.model.requires_grad_(False)
        after = adapted.world
        for name, value in before.tree().items():
            if name != "torch_random_state":
                problems = Comparison().differences(f"after apply, {name}", after.tree()[name], value, value)
                _refuse(problems)
        expected = _draws(adapted.model, before)
        if not torch.equal(expected, after.torch):
            raise AssertionError("after apply, torch's random state is not what the start of the adapters leaves")
        left = _objects(adapted.model)
        moved = [name for name, value in objects.items() if left.get(name) is not value]
        if moved:
            raise AssertionError(f"after apply, these are other objects: {', '.join(moved)}")
        for life in (self.dense, self.nudged):
            life.world = adapted.world
        self._agree({"after apply, the model": [life.model for life in self.lives]})
        self._start("default", seed)
        self._end()

    @rule(inputs=_WHICH, gradients=st.sampled_from(["on", "off", "inference"]))
    def call(self, inputs: int, gradients: str) -> None:
        self._called(inputs, gradients)
        self._end()

    @precondition(lambda self: not self.isfolded)
    @rule(inputs=_WHICH)
    def train_step(self, inputs: int) -> None:
        self._trained(inputs)
        self._end()

    @precondition(lambda self: not self.isfolded)
    @rule(inputs=_WHICH)
    def train_two_steps(self, inputs: int) -> None:
        for _ in range(2):
            self._trained(inputs)
        self._end()

    @precondition(lambda self: self.changes and not self.isfolded)
    @rule(what=_drawn(lambda machine: machine.changes or [""]), then=_THEN)
    def change(self, what: str, then: int | None) -> None:
        self._live(lambda life: _nothing(self.changes[what](life.model)))
        self._then(then)

    @precondition(lambda self: self.changes and not self.isfolded)
    @rule(what=_drawn(lambda machine: machine.changes or [""]), inputs=_WHICH)
    def change_and_train(self, what: str, inputs: int) -> None:
        self._live(lambda life: _nothing(self.changes[what](life.model)))
        self._trained(inputs)
        self._end()

    @rule(module=_MODULE, training=st.booleans(), then=_THEN)
    def mode(self, module: str, training: bool, then: int | None) -> None:
        self._live(lambda life: _nothing(life.model.get_submodule(module).train(training)))
        self._then(then)

    @precondition(lambda self: not self.isfolded)
    @rule(share=st.sampled_from([0.5, 1.25]), theta=st.booleans(), assign=st.booleans(), then=_THEN)
    def load_state_dict(self, share: float, theta: bool, assign: bool, then: int | None) -> None:
        self._live(lambda life: life.load(share, theta, assign))
        self._then(then)

    @precondition(lambda self: not self.isfolded)
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]), then=_THEN)
    def cast_and_back(self, dtype: torch.dtype, then: int | None) -> None:
        self._live(lambda life: [life.convert(dtype), life.convert(torch.float64)])
        self._then(then)

    @precondition(lambda self: not self.isfolded)
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]), inputs=_WHICH)
    def call_a_copy_in(self, dtype: torch.dtype, inputs: int) -> None:
        """What a lower precision makes of the state stays with the copy."""
        given = cast_inputs(self._inputs(inputs), dtype)
        worlds, originals, kept = ([getattr(life, k) for life in self.lives] for k in ("world", "model", "kept"))
        copied = self._live(_deepcopy)
        if copied:
            for life in self.lives:
                life.kept = deque(maxlen=2)
                life.convert(dtype)
            self._live(lambda life: _call(life, given, "on"), dtype)
        for life, world, model, outputs in zip(self.lives, worlds, originals, kept, strict=True):
            life.world, life.model, life.kept = world, model, outputs
        self._end()

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), then=_THEN)
    def go_on_with_a_copy(self, how: str, then: int | None) -> None:
        if how == "deepcopy":
            self._live(_deepcopy)
        elif _can_be_pickled(self.dense.model):
            self._live(_pickle)
        self._then(then)

    @precondition(lambda self: not self.isfolded and self.active)
    @rule(then=_THEN)
    def fold(self, then: int | None) -> None:
        if self._verb(lora_fx.fold):
            self.isfolded = True
            self._twins(lambda life: life.fold())
        self._then(then)

    @precondition(lambda self: self.isfolded)
    @rule(then=_THEN)
    def unfold(self, then: int | None) -> None:
        if self._verb(lora_fx.unfold):
            self.isfolded = False
            self._twins(lambda life: life.unfold())
        self._then(then)

    @precondition(lambda self: not self.isfolded and self.names)
    @rule(
        names=_drawn(lambda machine: [[], *([n] for n in machine.names), machine.names]),
        strength=st.sampled_from([1.0, 1.0, 0.5, -1.25]),
        then=_THEN,
    )
    def activate(self, names: list[str], strength: float, then: int | None) -> None:
        strengths = {name: strength if k == 0 else 1.0 for k, name in enumerate(names)}
        if self._verb(lora_fx.activate, strengths):
            self.active = list(names)
            self._twins(lambda life: life.activate(strengths))
        self._then(then)

    @precondition(lambda self: not self.isfolded and "second" not in self.names)
    @rule(
        kind=st.sampled_from(["lora", "dora", "full", "bias", "bottleneck", "compacter"]),
        check=st.booleans(),
        seed=_SEED,
        then=_THEN,
    )
    def apply_a_second(self, kind: str, check: bool, seed: int, then: int | None) -> None:
        settings: dict[str, Any] = {"rank": 1} if "rank" in kind_named(kind).settings else {}
        settings |= {} if kind_named(kind).is_delta else {"otherwise": "skip"}  # not every use can have a rewrite
        settings |= {"settings": {"n": 1}} if kind == "compacter" else {}  # which divides every number of features
        try:
            self._insert("second", Rule(when=EVERYTHING.when, kind=kind, **settings), check)
        except LoraFxError as error:
            self._refused("apply", error)
        else:
            self._start("second", seed)
            self._twins(lambda life: setattr(life.world, "torch", self.lives[0].world.torch))
        self._then(then)

    @precondition(lambda self: not self.isfolded and self.names)
    @rule(tensor=st.sampled_from(["A", "B", "shared"]), frozen=st.booleans(), then=_THEN)
    def freeze(self, tensor: str, frozen: bool, then: int | None) -> None:
        self._live(lambda life: life.freeze(tensor, frozen))
        self._then(then)

    @precondition(lambda self: not self.isfolded and self.names)
    @rule(factor=st.sampled_from([0.5, -1.25]), then=_THEN)
    def scale(self, factor: float, then: int | None) -> None:
        """Set alpha of every adapter that has one."""
        self._live(lambda life: life.scale(factor))
        self._then(then)

    @precondition(lambda self: not self.isfolded and self.names)
    @rule(name=_drawn(lambda machine: machine.names or [""]), then=_THEN)
    def remove(self, name: str, then: int | None) -> None:
        if self._verb(lora_fx.remove, name):
            self.names = [n for n in self.names if n != name]
            self.active = [n for n in self.active if n != name]
            self._twins(lambda life: life.remove(name))
        self._then(then)

    @precondition(lambda self: not self.isfolded and self.names)
    @rule(name=_drawn(lambda machine: machine.names or [""]), seed=_SEED, part=st.booleans(), then=_THEN)
    def replace(self, name: str, seed: int, part: bool, then: int | None) -> None:
        """Other numbers come out of a file, into the same parameters; of a part, for every second weight, and the rest
        begins anew."""

        def load_adapter(model: nn.Module) -> None:
            lora_fx.load_adapter(model, folder, name=name)

        with tempfile.TemporaryDirectory() as folder:
            numbers = self._written(name, seed, part, Path(folder))
            if numbers and self._verb(load_adapter):
                self._twins(lambda life: life.take(self.lives[0].theta(), name, numbers))
                for what, weight, delta in self.dense.started(name, numbers):
                    self._agree(
                        {f"{what}, begun anew,": [weight + delta, weight, self.nudged.moved(weight, weight.dtype)]}
                    )
        self._then(then)

    @rule(module=_MODULE, kind=st.sampled_from(list(_HOOKS)), inputs=_WHICH)
    def call_with_a_hook(self, module: str, kind: str, inputs: int) -> None:
        handles: list[Any] = []
        self._live(lambda life: handles.append(_HOOKS[kind](life.model.get_submodule(module))))
        given = self._inputs(inputs)
        if self.isfolded:
            self._live(lambda life: _call(life, given, "on"))
        else:
            self._live(lambda life: _train_step(life, given))
        for handle in handles:
            handle.remove()
        self._end()

    @rule(module=_MODULE, inputs=_WHICH)
    def interrupt(self, module: str, inputs: int) -> None:
        """Ctrl-C when this module's forward is through."""
        given = self._inputs(inputs)
        handles = [life.model.get_submodule(module).register_forward_hook(_interrupted) for life in self.lives]
        self._live(lambda life: _call(life, given, "on"))
        for handle in handles:
            handle.remove()
        self._end()

    @rule(inputs=_WHICH)
    def call_with_a_wrong_shape(self, inputs: int) -> None:
        def longer(value: Any) -> Any:
            return torch.cat([value, value[..., :1]], -1) if isinstance(value, torch.Tensor) and value.dim() else value

        given = mapped(self._inputs(inputs), longer)
        self._live(lambda life: _call(life, given, "on"))
        self._end()

    # What must hold

    def _end(self) -> None:
        """Of a step: the models, θ, what was returned before, and the world outside agree."""
        self.counts["steps"] += 1
        self._agree(
            {
                "the model": [life.model for life in self.lives],
                "θ": [life.theta() if not self.isfolded else {} for life in self.lives],
                "an earlier output": [life.kept for life in self.lives],
                "the world": [life.world.tree() for life in self.lives],
            }
        )

    def teardown(self) -> None:
        self.outside.restore()

    # How

    @property
    def dense(self) -> Dense:
        life = self.lives[1]
        assert isinstance(life, Dense)
        return life

    @property
    def nudged(self) -> Dense:
        life = self.lives[2]
        assert isinstance(life, Dense)
        return life

    def _made(self, training: bool) -> tuple[nn.Module, World]:
        self.outside.restore()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = type(self).make().double().train(training)
        return model, World(self.shared)

    def _inputs(self, which: int) -> Inputs:
        given = normalize_inputs(self.dense.model, self.examples[which])
        return mapped(given, lambda v: v.clone() if isinstance(v, torch.Tensor) else v)

    def _insert(self, name: str, rules: Any, check: bool) -> None:
        adapted = self.lives[0]
        adapted.world.restore()
        try:
            with _quiet():
                lora_fx.apply(adapted.model, rules, self._inputs(0), name=name, check=check or self.checked)
            self.names.append(name)
            self.active = [*self.active, name]
        finally:
            adapted.world = World(self.shared)
            self.outside.restore()

    def _start(self, name: str, seed: int) -> None:
        """An adapter's θ ≠ θ₀, in all lives."""
        model = self.lives[0].model
        others = [p for a in inventory(model).adapters if a.name != name for p in a.parameters()]
        before = [p.detach().clone() for p in others]
        Filling(seed, 0.5)(model)
        with torch.no_grad():
            for p, numbers in zip(others, before, strict=True):
                p.copy_(numbers)
        self._twins(lambda life: life.adopt(model, name))

    def _written(self, name: str, seed: int, part: bool, folder: Path) -> dict[str, torch.Tensor]:
        """The numbers that a file of an adapter now holds, by the names of θ. The adapter is what it was."""
        model, theta = self.lives[0].model, self.lives[0].theta()
        draw = torch.Generator().manual_seed(seed)
        before = {key: p.detach().clone() for key, p in theta.items()}
        try:
            held = held_of(model, name)[:: 2 if part else 1]
            with torch.no_grad():
                for p in theta.values():
                    p.mul_(0.75).add_(torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype) * 0.1)
            config, tensors, entries = as_own(held)
            write_folder(
                folder, config, tensors, {"version": VERSION, "name": name, "config": config, "adapters": entries}
            )
            own = {id(p) for h in held for p in h.adapter.parameters()}
            return {key: p.detach().clone() for key, p in theta.items() if id(p) in own}
        except LoraFxError as error:
            self._refused("save_adapter", error)
            return {}
        finally:
            with torch.no_grad():
                for key, p in theta.items():
                    p.copy_(before[key])

    def _verb(self, verb: Callable[..., Any], *arguments: Any) -> bool:
        """Whether lora_fx did it; where it refused, nothing may have changed."""
        adapted = self.lives[0]
        adapted.world.restore()
        try:
            with _quiet():
                verb(adapted.model, *arguments)
        except LoraFxError as error:
            self._refused(verb.__name__, error)
            return False
        finally:
            adapted.world = World(self.shared)
            self.outside.restore()
        return True

    def _refused(self, verb: str, error: LoraFxError) -> None:
        self.counts[f"{verb} refused: {error.place}: {error.reason}"] += 1

    def _twins(self, act: Callable[[Dense], Any]) -> None:
        for life in (self.dense, self.nudged):
            act(life)

    def _then(self, then: int | None) -> None:
        if then is not None:
            self._called(then, "on")
        self._end()

    def _called(self, inputs: int, gradients: str) -> None:
        given = self._inputs(inputs)
        self._live(lambda life: _call(life, given, gradients))

    def _trained(self, inputs: int) -> None:
        given = self._inputs(inputs)
        self._live(lambda life: _train_step(life, given))

    def _live(self, act: Callable[[Any], Any], precision: torch.dtype = torch.float64) -> bool:
        """The same act in each life, from its own world. Whether it came to an end in all of them."""
        outcomes = []
        for life in self.lives:
            life.world.restore()
            try:
                with _quiet():
                    outcomes.append(_Outcome(act(life)))
            except (Exception, _Interrupt) as error:
                outcomes.append(_Outcome(error=error))
            life.world = World(self.shared)
        self.outside.restore()
        adapted, dense = outcomes[:2]
        if type(adapted.error) is not type(dense.error):
            one, other = (f"{type(o.error).__name__}: {o.error}" if o.error else "nothing" for o in (adapted, dense))
            raise AssertionError(f"the adapted model raises {one}; the dense one {other}") from (
                adapted.error or dense.error
            )
        self._agree({"the call": [outcome.tree for outcome in outcomes]}, precision=precision)
        return adapted.error is None

    def _agree(
        self, trees: Mapping[str, Sequence[Any]], message: str = "", precision: torch.dtype = torch.float64
    ) -> None:
        comparison = Comparison(precision, self.isfolded)
        for name, (a, b, m) in trees.items():
            _refuse(comparison.differences(name, a, b, m), message)


def _nothing(value: Any) -> None:
    """A change returns nothing that counts."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse(problems: Iterator[str], message: str = "") -> None:
    for problem in problems:
        raise AssertionError(f"{message}{problem}")


def _objects(model: nn.Module) -> dict[str, Any]:
    """Buffers and containers, which somebody else may hold as well."""
    mutable = (torch.Tensor, list, dict, set, deque, types.SimpleNamespace)
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if not isinstance(module, Adapter)
        for name, value in {**vars(module), **module._buffers}.items()
        if not name.startswith("_") and isinstance(value, mutable)
    }


def _draws(model: nn.Module, before: World) -> torch.Tensor:
    """The random state that nothing but the start of the adapters leaves behind."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(before.torch)
        places = {place.adapter: place for place in reversed(inventory(model).places)}
        for adapter, place in reversed(places.items()):
            copy.deepcopy(adapter).start(place.parameter)
        return torch.get_rng_state()


def _deepcopy(life: Life) -> None:
    life.model = copy.deepcopy(life.model)


def _pickle(life: Life) -> None:
    life.model = pickle.loads(pickle.dumps(life.model))


def _can_be_pickled(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except Exception:  # whatever a model's own state says to that
        return False
    return True


# ── for everybody ────────────────────────────────────────────────────────────────────────────────────────────────────


def histories(
    make: Callable[[], nn.Module],
    inputs: Sequence[Any],
    changes: Sequence[str | Callable[[nn.Module], Any]] = (),
    *,
    rules: Any = EVERYTHING,
    shared: Sequence[Shared] = (),
) -> type[Histories]:
    """A Hypothesis state machine that holds your adapted model against its dense twin, whatever happens to it.

    Use its ``TestCase``, or `hypothesis.stateful.run_state_machine_as_test`. What is drawn: calls with each of the
    inputs, in train and eval mode, with and without gradients, in inference mode, with hooks, with inputs of a wrong
    shape, with an interrupt; training steps; `load_state_dict`, casts, copies and pickles; `fold`, `unfold`,
    `activate`, `remove`, a second adapter, and other numbers out of a file in its place; your changes. After each
    step outputs, gradients, θ, buffers, attributes, containers and random states must be those of the same model with
    W + δ written into its weights. A failure says what differs where, and shows the history that leads there, as a
    program.

    Args:
        make: a new model, equal each time. It is cast to float64, and so are the inputs.
        inputs: what the model is called with: each a tensor, a tuple of positional or a dict of keyword inputs. It is
            adapted on the first.
        changes: what else may happen to it: functions of the model, or statements about ``model``, which also see the
            names of the file that its class is from.
        rules: for `lora_fx.apply`; of a weight with several names they must adapt all or none.
        shared: what it reads or writes outside of itself.
    """
    model = make()
    scope = vars(sys.modules[type(model).__module__])
    described = dict(_described_change(change, scope) for change in changes)
    name = f"{getattr(make, '__name__', type(model).__name__)}Histories"
    return type(name, (Histories,), {
        "make": staticmethod(make),
        "examples": [cast_inputs(normalize_inputs(model, given), torch.float64) for given in inputs],
        "changes": described,
        "shared": tuple(shared),
        "rules_": rules,
        "counts": Counter(),
    })  # fmt: skip


def _described_change(change: str | Callable[[nn.Module], Any], scope: Mapping[str, Any]) -> tuple[str, Any]:
    if callable(change):
        return getattr(change, "__name__", repr(change)), change
    code = compile(change, f"<{change}>", "exec")
    return change, lambda model: exec(code, {**scope, "torch": torch, "nn": nn, "model": model})
