"""Law L15, histories: whatever happens to an adapted model, it is its dense twin, with all side effects.

Run it longer with ``LORA_FX_PROFILE=deep python -m pytest -n 0 -s tests/test_histories.py``; it prints how many steps
each module has lived through.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.deltas.adapter import Adapter
from lora_fx.model.inventory import inventory
from lora_fx.testing import histories
from lora_fx.testing.agreement import Comparison
from lora_fx.testing.twins import World
from tests import test_rewrites as rewrites
from tests.stateful import STATEFUL, sequences

DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"
EVERYTHING = Rule(when=lambda site: min(site.in_features, site.out_features) > 1, rank=2, alpha=3)

pytestmark = pytest.mark.laws


@pytest.fixture(scope="module")
def lived():
    """Steps and histories by module, printed at the end."""
    found: dict[str, Counter] = {}
    yield found
    print(f"\n{'module':24}{'steps':>8}{'histories':>11}")
    for name, counts in found.items():
        print(f"{name:24}{counts['steps']:8}{counts['histories']:11}")
        for what in sorted(set(counts) - {"steps", "histories"}):
            print(f"    {counts[what]} × {what}")
    total = sum(found.values(), Counter())
    print(f"{f'{len(found)} modules':24}{total['steps']:8}{total['histories']:11}")


ADAPTED = [pytest.param(row, id=row.name) for row in STATEFUL if not row.refused]


@pytest.mark.parametrize("row", ADAPTED if DEEP else ADAPTED[::2])
def test_l15_an_adapted_model_is_its_dense_twin_after_any_history(row, lived):
    machine = histories(row.make, row.inputs(), row.changes, rules=EVERYTHING, shared=row.shared)
    machine.checked, lived[row.name] = row.checked, machine.counts
    examples, steps = (12, 30) if DEEP else (1, 8)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps))


REWRITES = {
    "PreLayer": [rewrites.LAYERS, rewrites.QV],
    "PreEmbed": [rewrites.TOKENS, *rewrites.SYSTEMS["adapter L"]],
    "Compacter": [rewrites.TOKENS, *rewrites.SYSTEMS["compacter"], rewrites.QV],
}


@pytest.mark.parametrize("rules", REWRITES.values(), ids=REWRITES)
def test_l15_with_what_is_no_delta(rules, lived):
    inputs = [rewrites.IDS, rewrites.WITH_TOKENS, rewrites.WITH_TOKENS.flip(0, 1)]
    machine = histories(rewrites.model, inputs, ["model.blocks[0].norm.eps = 1e-2"], rules=rules)
    lived[f"rewrites: {len(lived)}"] = machine.counts
    examples, steps = (12, 30) if DEEP else (1, 8)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps))


def test_a_history_of_what_stands_behind_blocks():
    state = histories(rewrites.model, [rewrites.IDS, rewrites.WITH_TOKENS], rules=REWRITES["PreLayer"])()
    state.apply(check=False, training=True, seed=1)
    state.train_step(inputs=1)
    state.train_two_steps(inputs=0)
    state.apply_a_second(kind="bottleneck", check=False, seed=2, then=1)
    state.train_step(inputs=1)
    state.fold(then=1)  # refused
    state.call_with_a_hook(module="blocks.0", kind="forward", inputs=1)
    state.interrupt(module="blocks.1", inputs=1)
    state.go_on_with_a_copy(how="pickle", then=1)
    state.activate(names=["second"], strength=1.0, then=0)
    state.activate(names=["default", "second"], strength=1.0, then=1)
    state.cast_and_back(dtype=torch.bfloat16, then=1)
    state.load_state_dict(share=0.5, theta=True, assign=True, then=1)
    state.train_step(inputs=1)
    assert any("does not fold" in what for what in state.counts), state.counts
    state.remove(name="second", then=1)
    with torch.no_grad():
        state.lives[0].model.words.weight_lora_default.block_1.mul_(1 + 2**-20)
    with pytest.raises(AssertionError, match="differs"):
        state.call(inputs=1, gradients="on")
    state.teardown()


def test_a_history_of_what_adapters_have_in_common():
    state = histories(rewrites.model, [rewrites.IDS, rewrites.WITH_TOKENS], rules=REWRITES["Compacter"])()
    state.apply(check=False, training=True, seed=1)
    state.train_step(inputs=1)
    state.apply_a_second(kind="compacter", check=True, seed=2, then=1)
    state.train_two_steps(inputs=1)
    state.freeze(tensor="shared", frozen=True, then=1)
    state.train_step(inputs=0)
    state.activate(names=["second"], strength=1.0, then=0)
    state.freeze(tensor="shared", frozen=False, then=1)
    state.go_on_with_a_copy(how="pickle", then=0)
    state.activate(names=["default", "second"], strength=1.0, then=1)
    state.cast_and_back(dtype=torch.bfloat16, then=1)
    state.load_state_dict(share=0.5, theta=True, assign=True, then=1)
    state.train_step(inputs=1)
    state.remove(name="default", then=0)
    state.train_step(inputs=0)
    with torch.no_grad():
        state.lives[0].model.blocks[0].o.weight_lora_second.shared.mul_(1 + 2**-20)
    with pytest.raises(AssertionError, match="differs"):
        state.call(inputs=0, gradients="on")
    state.teardown()


@pytest.mark.parametrize("row", [row for row in STATEFUL if row.refused], ids=lambda row: row.name)
def test_what_cannot_be_adapted_is_refused_and_left_as_it_was(row):
    model, twin = row.make().double(), row.make().double()
    twin.load_state_dict(model.state_dict())
    world = World(row.shared)
    with pytest.raises(LoraFxError, match=row.refused):
        lora_fx.apply(model, EVERYTHING, row.inputs()[0])
    assert not list(Comparison().differences("the model", model, twin, twin))
    assert World(row.shared).tree() == world.tree()


def test_every_kind_of_step_in_one_history():
    state = histories(Recording, sequences(), ["model.t.mul_(2)", "model.log.clear()"])()
    state.apply(check=True, training=True, seed=1)
    state.train_step(inputs=0)
    state.change("model.t.mul_(2)", then=1)
    state.load_state_dict(share=0.5, theta=True, assign=True, then=2)
    state.train_two_steps(inputs=1)
    state.apply_a_second(kind="dora", check=False, seed=2, then=0)
    state.train_step(inputs=2)
    state.replace(name="second", seed=3, part=False, then=0)
    state.train_step(inputs=2)
    state.scale(factor=-1.25, then=0)
    state.cast_and_back(dtype=torch.bfloat16, then=0)
    state.call_a_copy_in(dtype=torch.bfloat16, inputs=1)
    state.go_on_with_a_copy(how="deepcopy", then=0)
    state.go_on_with_a_copy(how="pickle", then=0)
    state.mode(module="", training=False, then=0)
    state.activate(names=["second"], strength=0.5, then=0)
    state.train_step(inputs=0)
    state.activate(names=["default", "second"], strength=-1.25, then=0)
    state.fold(then=0)
    state.interrupt(module="", inputs=0)
    state.unfold(then=0)
    state.call_with_a_hook(module="", kind="full_backward", inputs=1)
    state.call_with_a_wrong_shape(inputs=0)
    state.remove(name="default", then=0)
    state.change_and_train("model.log.clear()", inputs=2)
    state.call(inputs=0, gradients="inference")
    state.teardown()
    assert state.counts == {"steps": 26, "histories": 1}


def two_layers():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def test_a_part_of_an_adapter_is_replaced_and_the_rest_begins_anew():
    state = histories(two_layers, sequences())()
    state.apply(check=False, training=True, seed=1)
    state.train_step(inputs=0)
    state.replace(name="default", seed=2, part=True, then=0)
    assert [bool(place.adapter.B.any()) for place in inventory(state.lives[0].model).places] == [True, False]
    state.train_two_steps(inputs=0)
    state.replace(name="default", seed=3, part=False, then=1)
    state.fold(then=0)
    state.teardown()
    assert state.counts == {"steps": 6, "histories": 1}


@pytest.mark.parametrize(
    ("lost", "says"),
    [("_begin_anew", "2.weight, begun anew, differs"), ("_New.write", r"θ\['0.weight: default.A'\] differs")],
)
def test_old_numbers_that_stay_are_found(lost, says, monkeypatch):
    monkeypatch.setattr(f"lora_fx.export.adapters.replace.{lost}", lambda *_: None)
    state = histories(two_layers, sequences())()
    state.apply(check=False, training=True, seed=1)
    with pytest.raises(AssertionError, match=says):
        state.replace(name="default", seed=2, part=True, then=None)
    state.teardown()


# ── power ────────────────────────────────────────────────────────────────────────────────────────────────────────────


FAULTS: dict = {}
"""id of a model → what happens to its outputs."""


class Recording(nn.Linear):
    """What the defects below are put into."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.t = nn.Buffer(torch.tensor(0.3))
        self.scale, self.log, self.settings = 2, [], {"shift": 0.5}

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias).tanh() * self.scale + self.t
        return FAULTS.get(id(self), torch.Tensor.clone)(y)


def _returning(function):
    return lambda model, adapter: FAULTS.update({id(model): function})


def _raising(y):
    raise ValueError("a defect")


DEFECTS = {
    "a lost branch": (lambda model, adapter: adapter.B.data.zero_(), r"θ\['weight: default.B'\] differs"),
    "a sum that is off": (_returning(lambda y: y * (1 + 2**-30)), "the call.returned differs"),
    "a changed weight": (lambda model, adapter: model._parameters["weight"].data.mul_(1.5), "own bits have changed"),
    "a buffer": (lambda model, adapter: model.t.add_(1e-9), "the model.t differs"),
    "a number": (lambda model, adapter: setattr(model, "scale", 3), "the model.scale is 3, not 2"),
    "another type": (lambda model, adapter: setattr(model, "scale", 2.0), "a float, not 2, a int"),
    "a setting": (lambda model, adapter: model.settings.update(shift=1.0), "the model.settings.shift differs"),
    "a log": (lambda model, adapter: model.log.append(1), "the model.log has 1 items, not 0"),
    "a new attribute": (
        lambda model, adapter: setattr(model, "kept", 1),
        "the model.kept is 1: the dense model has no",
    ),
    "a mode": (lambda model, adapter: model.train(), "the model.training is True, not False"),
    "a hook": (lambda model, adapter: model.register_forward_hook(_raising), "the model._forward_hooks is 1, not 0"),
    "a draw": (lambda model, adapter: torch.rand(1), "the world.torch_random_state is"),
    "a draw of Python's": (lambda model, adapter: random.random(), "the world.python_random_state is"),
    "a draw of numpy's": (lambda model, adapter: np.random.rand(), "the world.numpy_random_state is"),
    "an exception": (_returning(_raising), "the adapted model raises ValueError: a defect; the dense one nothing"),
    "a gradient of the wrong sign": (
        lambda model, adapter: adapter.A.register_hook(lambda g: -g),
        r"\['gradient of θ'\]\['weight: default.A'\] differs",
    ),
    "a lost gradient": (_returning(torch.Tensor.detach), "not float64 .* with a gradient"),
    "no training": (lambda model, adapter: adapter.B.requires_grad_(False), "not float64 .* with a gradient"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_in_a_history_is_found_and_named(name):
    defect, message = DEFECTS[name]
    FAULTS.clear()

    def broken(model):
        for module in [m for m in model.modules() if isinstance(m, Adapter)]:
            defect(model, module)

    state = histories(Recording, sequences(), [broken])()
    state.apply(check=False, training=False, seed=1)
    state.call(inputs=1, gradients="on")
    with pytest.raises(AssertionError, match=message):
        state.change("broken", then=None)
        state.call(inputs=0, gradients="on")
        state.train_step(inputs=0)
    state.teardown()


def test_an_output_that_a_later_call_writes_to_is_found():
    state = histories(Recording, sequences())()
    state.apply(check=False, training=False, seed=1)
    state.call(inputs=0, gradients="off")
    state.lives[0].kept[0].add_(1)
    with pytest.raises(AssertionError, match=r"an earlier output\[0\] differs"):
        state.mode(module="", training=False, then=None)
    state.teardown()


def test_a_failing_history_is_printed_as_a_program_that_fails_again():
    def frozen(model):
        model.settings["shift"] = "old" if any(isinstance(m, Adapter) for m in model.modules()) else "new"

    machine = histories(Recording, sequences(), [frozen])
    quick = settings(max_examples=100, stateful_step_count=4, phases=[Phase.generate], database=None)
    with pytest.raises(AssertionError, match=r"the model\.settings\.shift is 'old', not 'new'") as caught:
        run_state_machine_as_test(machine, settings=settings(quick, derandomize=True))
    program = "\n".join(caught.value.__notes__)
    assert "state = RecordingHistories()" in program and "frozen" in program
    lines = [line for line in program.splitlines() if line.startswith("state")]
    with pytest.raises(AssertionError, match=r"the model\.settings\.shift is 'old', not 'new'"):
        exec("\n".join(lines), {"RecordingHistories": machine, "torch": torch})


def test_a_model_that_is_another_each_time_is_no_twin():
    count = itertools.count()

    def make():
        model = Recording()
        model.scale = next(count)
        return model

    state = histories(make, sequences())()
    with pytest.raises(AssertionError, match=r"make\(\) does not give the same model twice: as made.scale is 1, not 2"):
        state.apply(check=False, training=False, seed=0)


def test_the_table_has_forty_modules_each_with_a_name_of_its_own():
    assert len({row.name for row in STATEFUL}) == len(STATEFUL)
    assert sum(not row.refused for row in STATEFUL) >= 40
