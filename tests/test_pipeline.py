"""Passes and pipelines: they print, check, compose, time and dump; what refuses leaves the model bitwise as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.errors import AdapterError, PipelineError, PlanError
from lora_fx.graph.program import Program
from lora_fx.model.inventory import inventory
from lora_fx.passes import (
    Analyse,
    Capture,
    Check,
    Condition,
    Facts,
    Fold,
    Insert,
    Inserted,
    Pass,
    Pipeline,
    Plan,
    Result,
    Rewrite,
    Select,
    Sites,
    Unfold,
    given,
)
from tests.reference import bits, same_bits

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
RULES = Rule(where="*", rank=2, alpha=4)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def state(model: nn.Module) -> tuple[Any, ...]:
    """What a refusal must leave alone, beside the numbers."""
    classes = [type(m) for m in model.modules()]
    return classes, [dict(m.__dict__) for m in model.modules()], [p.requires_grad for p in model.parameters()]


def refused(call: Any, model: nn.Module, error: type[LoraFxError], *words: str) -> None:
    numbers, rest = bits(model), state(model)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert same_bits(numbers, bits(model)) and state(model) == rest


@dataclass(frozen=True)
class Note(Pass):
    """Notes that it ran, and on what."""

    seen: list[Any]

    name = "note"

    def call(self, model: nn.Module, facts: Facts) -> Result:
        self.seen.append([kind for kind in (Program, Sites, Plan, Inserted) if kind in facts])
        return Result(model, modified=False)


@dataclass(frozen=True)
class Spoil(Pass):
    """Changes a weight, and says how to undo that."""

    name = "spoil"
    fails: bool = False

    def call(self, model: nn.Module, facts: Facts) -> Result:
        weight = model[0].weight.detach()
        old = weight.clone()
        facts.undo.append(lambda: weight.copy_(old))
        weight.add_(1)
        if self.fails:
            raise PlanError("it is spoilt", place="spoil", remedy="leave it out")
        return Result(model, modified=True)


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_default_pipeline_prints_each_pass_with_what_it_requires_and_ensures():
    lines = str(lora_fx.pipeline("apply", RULES, {"x": X})).splitlines()
    assert lines[0] == "apply" and len(lines) == 3 + 7
    assert [line.split()[1] for line in lines[3:]] == [
        "capture", "analyse", "select", "schedule", "insert", "rewrite", "check",
    ]  # fmt: skip
    assert "example_inputs={'x': float32 (4, 5)}" in lines[3] and lines[3].rstrip().endswith("Program")
    assert "Program, Sites" in lines[5] and "rank=2" in lines[5]


@pytest.mark.parametrize(
    ("verb", "arguments", "passes"),
    [
        ("plan", (RULES, X), ("capture", "analyse", "select", "schedule")),
        ("fold", (), ("fold",)),
        ("unfold", (), ("unfold", "rewrite")),
        ("activate", ("default",), ("activate", "rewrite")),
        ("deactivate", (), ("activate", "rewrite")),
        ("remove", ("default",), ("remove", "rewrite")),
        ("switch", ("default",), ("require", "unfold", "activate", "fold")),
        ("load_adapter", ("folder",), ("read", "schedule", "insert", "rewrite", "check", "rest")),
        ("rename", ("a", "b"), ("rename", "rewrite")),
    ],
)
def test_every_verb_is_a_pipeline(verb, arguments, passes):
    pipeline = lora_fx.pipeline(verb, *arguments)
    assert pipeline.names == passes and str(pipeline).startswith(f"{verb}\n")


def test_a_run_prints_what_each_pass_did_and_for_how_long():
    model = two_layers()
    run = lora_fx.pipeline("apply", RULES, X)(model)
    assert run.model is model and run.modified and run.seconds > 0
    assert [step.modified for step in run.steps] == [False, False, False, False, True, True, False]
    lines = str(run).splitlines()
    assert lines[0].split() == ["pass", "ms", "model", "gave"] and lines[-1].startswith("apply: ")
    assert "Inserted" in lines[6] and len(lines) == 3 + 7
    assert len(run.facts[Plan].rows) == 2 and len(run.facts[Inserted].adapters) == 2


# ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_passes_are_inserted_and_left_out_by_name():
    seen: list[Any] = []
    pipeline = lora_fx.pipeline("apply", RULES, X)
    model = two_layers()
    changed = pipeline.after("select", Note(seen)).without("check")
    assert changed.names == ("capture", "analyse", "select", "note", "schedule", "insert", "rewrite")
    assert pipeline.names[-1] == "check", "a pipeline is a value"
    changed(model)
    assert seen == [[Program, Sites, Plan]] and len(inventory(model).places) == 2
    assert pipeline.before("capture", Note(seen)).names[0] == "note"
    assert isinstance(pipeline["fold" if "fold" in pipeline.names else "check"], Check)


def test_a_pipeline_of_ones_own_is_the_verb():
    ours, theirs = two_layers(), two_layers()
    torch.manual_seed(1)
    Pipeline("mine", (Capture(X), Analyse(), Select(RULES), Insert(), Rewrite()))(ours)
    torch.manual_seed(1)
    lora_fx.apply(theirs, RULES, X, check=False)
    assert same_bits(bits(ours), bits(theirs)) and lora_fx.show(ours[0]) == lora_fx.show(theirs[0])


def test_a_pass_runs_alone():
    model = lora_fx.apply(two_layers(), RULES, X)
    before = bits(model)
    assert Fold()(model).modified and not Fold()(model).modified
    assert Unfold()(model).modified
    assert not Unfold(if_folded=True)(model).modified
    Rewrite()(model)
    assert same_bits(before, bits(model))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipeline_without_what_a_pass_needs_is_refused_when_it_is_made():
    with pytest.raises(PipelineError, match=r"'select' requires Sites.*\n.*the passes are capture, select"):
        Pipeline("mine", (Capture(X), Select(RULES)))
    with pytest.raises(PipelineError, match="'schedule' requires Plan"):
        lora_fx.pipeline("apply", RULES, X).without("select")


def test_names_that_are_twice_or_not_there():
    pipeline = lora_fx.pipeline("apply", RULES, X)
    for call in (
        lambda: pipeline.before("nobody", Rewrite()),
        lambda: pipeline.after("nobody", Rewrite()),
        lambda: pipeline.without("check", "nobody"),
        lambda: pipeline["nobody"],
    ):
        with pytest.raises(PipelineError, match=r"no pass named 'nobody'\n.*capture, analyse, select, schedule"):
            call()
    with pytest.raises(PipelineError, match="two passes have the name 'rewrite'"):
        pipeline.after("check", Rewrite())
    with pytest.raises(PipelineError, match=r"no pipeline 'nothing'\n.*apply, fold, unfold"):
        lora_fx.pipeline("nothing")


def test_a_condition_that_does_not_hold_before_a_pass():
    model = two_layers()
    refused(lambda: Check()(model), model, PipelineError, "pass 'check' on Sequential", "Inserted", "→")
    refused(lambda: Insert()(model), model, PipelineError, "no Program has been given")
    adapted = lora_fx.apply(two_layers(), RULES, X)
    lora_fx.fold(adapted)
    refused(lambda: lora_fx.activate(adapted, "default"), adapted, PlanError, "folded", "unfold")
    refused(lambda: lora_fx.remove(adapted, "default"), adapted, PlanError, "folded", "unfold")


def test_a_condition_that_a_pass_breaks_or_does_not_ensure():
    @dataclass(frozen=True)
    class Lazy(Pass):
        name = "lazy"
        ensures = (Condition("a model in eval mode", lambda model, facts: "it trains" if model.training else ""),)

        def call(self, model: nn.Module, facts: Facts) -> Result:
            return Result(model, modified=False)

    model = two_layers()
    chain = Pipeline("mine", (Spoil(), Lazy()))
    refused(lambda: chain(model), model, PipelineError, "pass 'lazy'", "it ensures a model in eval mode", "it trains")
    chain(model.eval())

    unwired = lora_fx.pipeline("apply", RULES, X).without("rewrite")
    refused(lambda: unwired(model), model, PipelineError, "pass 'check'", "no module has a class that reads them")


def test_a_refusal_in_the_middle_undoes_the_passes_before_it():
    model = two_layers()
    refused(lambda: Pipeline("mine", (Spoil(fails=True),))(model), model, PlanError, "it is spoilt")
    late = lora_fx.pipeline("apply", RULES, X).after("rewrite", Spoil(fails=True))
    refused(lambda: late(model), model, PlanError, "it is spoilt")
    adapted = lora_fx.apply(two_layers(), RULES, X)
    with torch.no_grad():
        adapted[0].weight_lora_default.B.normal_()
    folding = lora_fx.pipeline("fold").after("fold", Spoil(fails=True))
    refused(lambda: folding(adapted), adapted, PlanError, "it is spoilt")


def test_a_plan_of_another_model_is_refused():
    @dataclass(frozen=True)
    class Borrow(Pass):
        plan: Plan
        name = "borrow"
        ensures = (given(Program), given(Plan))

        def call(self, model: nn.Module, facts: Facts) -> Result:
            return Result(model, False, (self.plan.program, self.plan))

    plan, model = lora_fx.plan(two_layers(), RULES, X), two_layers()
    chain = Pipeline("mine", (Borrow(plan), Insert(), Rewrite()))
    refused(lambda: chain(model), model, PipelineError, "another model object")


def test_an_unknown_adapter_is_one_error():
    model = lora_fx.apply(two_layers(), RULES, X)
    for verb in (lora_fx.activate, lora_fx.remove, lora_fx.switch):
        refused(lambda verb=verb: verb(model, "task"), model, AdapterError, "named 'task'", "it has default")
    for call in (
        lambda: lora_fx.save_adapter(model, "nowhere", name="task"),
        lambda: lora_fx.save_onnx_adapter(model, "nowhere", name="task"),
    ):
        refused(call, model, AdapterError, "named 'task'", "it has default")
    refused(lambda: lora_fx.remove(model), model, AdapterError, "no name is given", "'default'")


def test_a_fact_that_is_not_there_says_what_is():
    @dataclass(frozen=True)
    class Ask(Pass):
        name = "ask"

        def call(self, model: nn.Module, facts: Facts) -> Result:
            assert facts.get(Plan) is None
            return Result(model, False, (facts[Plan],))

    model = two_layers()
    chain = Pipeline("mine", (Capture(X), Ask()))
    refused(lambda: chain(model), model, PipelineError, "gives a Plan", "given(Plan)", "it has Program")


# ── the dump ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_dump_shows_what_every_pass_changed(tmp_path):
    model = two_layers()
    run = lora_fx.pipeline("apply", RULES, X)(model, dump=tmp_path)
    changed = {step.name: step.changed for step in run.steps}
    assert changed["insert"] == changed["rewrite"] == ("0", "2") and changed["capture"] == changed["check"] == ()
    assert (tmp_path / "03-select" / "plan.txt").read_text().startswith("weight")
    before, after = ((tmp_path / "06-rewrite" / f"0.{moment}.txt").read_text() for moment in ("before", "after"))
    assert "return F.linear(input, self.weight, self.bias)" in before and "self.weight_lora_default.A" in after
    assert before.splitlines()[:7] == after.splitlines()[:7], "the numbers are the same ones"
    plain = (tmp_path / "05-insert" / "0.before.txt").read_text()
    assert "weight: float32 (7, 5) trained #" in plain and "weight: float32 (7, 5) frozen #" in after
    assert "weight_lora_default: rank=2, scale=2, active" in before and "B: float32 (7, 2) trained #" in before

    with torch.no_grad():
        model[0].weight_lora_default.B.normal_()
    folded = lora_fx.pipeline("fold")(model, dump=tmp_path / "fold")
    old, new = ((tmp_path / "fold" / "01-fold" / f"0.{moment}.txt").read_text() for moment in ("before", "after"))
    line = {moment: next(x for x in text.splitlines() if "weight:" in x) for moment, text in (("o", old), ("n", new))}
    assert line["o"] != line["n"] and "lora" not in new and folded.steps[0].changed == ("0", "2")
