"""The verbs. Each that changes a model is a pipeline of passes, which `pipeline` hands out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_fx.analysis.rules import read_rules
from lora_fx.analysis.words import refuse_words
from lora_fx.application.combination import combining, extracting
from lora_fx.changes import changing, in_turn
from lora_fx.checks.certification import Certificate, certify_adapted
from lora_fx.checks.footprint import Memory, measured, on_meta
from lora_fx.checks.oracles import misrounded
from lora_fx.checks.verification import copied
from lora_fx.errors import LoraFxError, PipelineError
from lora_fx.export.adapters.configs import Start, is_config, rules_from_peft
from lora_fx.export.adapters.files import loading
from lora_fx.export.onnx.export import exporting
from lora_fx.graph.capture import normalize_inputs
from lora_fx.model.inventory import base_parameters, inventory, weight_name
from lora_fx.passes.activate import Activate, Remove, Rename, Require, Restore, acting
from lora_fx.passes.base import Pass
from lora_fx.passes.fold import Fold, Unfold
from lora_fx.passes.insert import Check, Insert, Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Analyse, Capture, Plan, Schedule, Select


def pipeline(verb: str, *arguments: Any, **options: Any) -> Pipeline:
    """The passes that a verb runs, to print, to change, and to run on a model.

    Args:
        verb: ``plan``, ``apply``, ``fold``, ``unfold``, ``activate``, ``deactivate``, ``remove``, ``rename``,
            ``switch``, ``combine``, ``extract``, ``load_adapter`` or ``export_onnx``.
        arguments, options: those of the verb, without the model; ``fold`` has no ``copy`` here.

    Raises:
        PipelineError: there is no such verb.
        RuleError, PlanError: a rule or a name among the arguments is malformed.
    """
    if verb not in _PIPELINES:
        raise PipelineError(
            f"there is no pipeline {verb!r}", place="pipeline", remedy=f"there are {', '.join(_PIPELINES)}"
        )
    return Pipeline(verb, tuple(_PIPELINES[verb](*arguments, **options)))


def _plan(rules: Any, example_inputs: Any = None, *, name: str = "default") -> tuple[Pass, ...]:
    if is_config(rules):
        return Start(rules_from_peft(rules), example_inputs, name), Schedule()
    return Capture(example_inputs), Analyse(), Select(read_rules(rules), name), Schedule()


def _apply(rules: Any, example_inputs: Any = None, *, name: str = "default", check: bool = True) -> tuple[Pass, ...]:
    return *_plan(rules, example_inputs, name=name), Insert(), Rewrite(), *([Check()] if check else [])


_PIPELINES: dict[str, Callable[..., tuple[Pass, ...]]] = {
    "plan": _plan,
    "apply": _apply,
    "fold": lambda final=False: (Fold(final),),
    "unfold": lambda: (Unfold(), Rewrite()),
    "activate": lambda *names: (Activate(names), Rewrite()),
    "deactivate": lambda: (Activate(()), Rewrite()),
    "remove": lambda *names: (Remove(names), Rewrite()),
    "rename": lambda old, new: (Rename(old, new), Rewrite()),
    "switch": lambda *names: (Require(names), Unfold(if_folded=True), Activate(names), Fold()),
    "combine": combining,
    "extract": extracting,
    "load_adapter": loading,
    "export_onnx": exporting,
}


def plan(model: nn.Module, rules: Any, example_inputs: Any = None, *, name: str = "default") -> Plan:
    """What `apply` would do. Nothing is changed.

    Args:
        rules: see `lora_fx.Rule`; also dicts, a sequence of those, or the path of a TOML file.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. Without them the model is asked for
            its own (`dummy_inputs`); a model that has none is planned from its module types, and rules by name and form
            work.
        name: the adapter's name.

    Raises:
        RuleError: a rule is malformed or decides no site.
        PlanError: a site cannot be adapted.
        CaptureError: the model cannot be captured.
    """
    return pipeline("plan", rules, example_inputs, name=name)(model).facts[Plan]


def memory(
    model: nn.Module,
    rules: Any,
    optimizer: Any = "adamw",
    dtype: torch.dtype | None = None,
    inputs: Any = None,
    *,
    device: torch.device | str | None = None,
) -> Memory:
    """What training with these rules holds in memory, and full fine-tuning beside it, before any of it is there.

    Bytes of weights, adapters, gradients, optimizer state, and of what autograd keeps for backward (saved tensors, each
    storage once; not the inputs). The adapted forward runs once on tensors without memory, so the model may be on meta.
    What a step holds for a moment (workspaces, the gradients of activations) is not in it. Nothing is changed.

    Args:
        rules: as in `apply`.
        optimizer: a name (``"adamw"``, ``"adam"``, ``"sgd"``, …), or what makes an optimizer of a list of parameters.
        dtype: of the model's floating parameters and buffers; None for those that it has.
        inputs: as in `apply`: their shapes decide what is kept.
        device: whose kernels are taken; None for the model's, and the CPU for a model on meta.

    Returns:
        A report: `print` it as a table, or keep its `to_json()`.

    Raises:
        LoraFxError: the model has adapters already, there is no such optimizer; and as in `apply`.
    """
    with in_turn():
        if inventory(model).adapters:
            raise LoraFxError(
                "it has adapters already", place=type(model).__name__, remedy="pass the base model, and all rules"
            )
        given = normalize_inputs(model, inputs)
        first = next((t.device for t in model.parameters() if not t.is_meta), torch.device("cpu"))
        where = first if device is None else torch.device(device)
        twin = on_meta(model, dtype).requires_grad_()
        full = measured(twin, given, optimizer, where, ())
        parameters = sum(p.numel() for p in twin.parameters())
        apply(twin, rules, given, check=False)
        own = [p for adapter in inventory(twin).adapters for p in adapter.parameters()]
        return Memory(measured(twin, given, optimizer, where, own), full, sum(p.numel() for p in own), parameters)


def apply(
    model: nn.Module,
    rules: Any = None,
    example_inputs: Any = None,
    *,
    name: str = "default",
    check: bool = True,
    **words: Any,
) -> nn.Module:
    """Insert trainable adapters where the rules say, in place; the first ones freeze the model's own parameters.

    The model keeps its class, its `state_dict` keys and its outputs (B = 0: bit for bit). Adapter parameters stand
    beside the weights they belong to: ``q_proj.weight`` gains ``q_proj.weight_lora_default.A`` and ``.B``.

    Args:
        rules: one `Rule` or several; dicts; the path of a TOML file. The first rule that matches a site decides it.
            Or a `peft.LoraConfig`, see `rules_from_peft`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; transformers' models have some.
        name: the adapter's name. Applying again adds a second adapter under another name, further sites under the same.
        check: compare the adapted model with the dense W + δ on the example inputs, in train and in eval mode.
        words: none; PEFT's (`r`, `target_modules`, …) are answered with ours.

    Returns:
        The same model.

    Raises:
        LoraFxError: a rule, a site, the inputs or the self-check refuses; the model is bitwise what it was.
    """
    refuse_words(words, "apply", "the arguments are rules, example_inputs, name and check")
    return pipeline("apply", rules, example_inputs, name=name, check=check)(model).model


def certify(model: nn.Module, example_inputs: Any = None, *, gradients: bool = True) -> Certificate:
    """Measure every use of every adapted weight: is it W + δ, and how is it realised?

    Each use is held against the same op on the dense sum, on the x that reaches it, with random factors (B ≠ 0), in the
    recorded program of the adapted model, and in float64 whatever the model's dtype. Then the whole model, in eval and
    in train mode: against the model with the dense sums, or, where it is large and no weight is to be written, against
    that program, and with B = 0 against the base model, bit for bit. Of a folded model the branches are put back for
    that, every folded element is checked to be the sum rounded once, and the model is folded again. Afterwards the
    model is bitwise what it was.

    Takes two captures and some ten runs of the model, of kinds without factors the dense sum of one weight at a
    time in float64, and, for a folded model, a second copy of its folded weights.

    Args:
        example_inputs: as in `apply`. What they do not reach is listed as unseen, never as covered.
        gradients: also run backward once, and name the adapters that no gradient reaches.

    Returns:
        A certificate, true where every use was seen and is W + δ: `print` it, or keep its `to_json()`.

    Raises:
        PlanError: the model has no active adapter, or its fold was final.
        CaptureError: the model does not run on the inputs, or is on meta.
        LoraFxError: a thread is inside a forward of the model.
    """
    with changing(model, "certify") as undo:
        here = inventory(model)
        if not here.folded:
            return certify_adapted(model, example_inputs, undo, gradients=gradients)
        folded = {
            weight_name(here.modules[module][0], attribute): module._parameters[attribute].detach().clone()  # type: ignore[union-attr]
            for module, record in here.records.items()
            for attribute in record.attributes
        }
        unfold(model)
        certificate = certify_adapted(model, example_inputs, undo, gradients=gradients)
        plain, acting = base_parameters(model), inventory(model).by_weight(active=True)
        wrong = {name: misrounded(plain[name], weight, acting[name]).numel() for name, weight in folded.items()}
        fold(model)
    return replace(certificate, folded=wrong)


def adapters(model: nn.Module) -> dict[str, list[str]]:
    """The adapters in the model: name → names of the weights it adapts. Those that a fold put away are not among them.

    Raises:
        LoraFxError: an adapted weight is no parameter any more.
    """
    found: dict[str, dict[str, None]] = {}  # the names of the weights once each, in order
    for place in inventory(model).places:
        found.setdefault(place.adapter.name, {})[place.weight] = None
    return {name: list(weights) for name, weights in found.items()}


def activate(model: nn.Module, *names: str | Mapping[str, float]) -> nn.Module:
    """Make exactly these adapters act; all others stay, and do nothing. No name: the base model.

        activate(model, {"a": 0.7, "b": -0.3})      W + 0.7·δa − 0.3·δb

    A strength multiplies δ, whatever the kind, in the next forward and in folds and exports; a name alone has 1, and 0
    is as if it were not named. It is a number, not code: nothing is traced or compiled anew for another one. Files of
    adapters hold what was trained, without it.

    An adapter that ceases to act does not train; when it acts again, what trained of it before does. Every other
    ``requires_grad`` stays what it is: see `lora_fx.model.training`.

    Returns:
        The same model.

    Raises:
        AdapterError: there is no adapter of a name; or a strength is no finite number, or of a kind that has no δ.
        LoraFxError: a thread is inside a forward of the model.
    """
    return pipeline("activate", *names)(model).model


def deactivate(model: nn.Module) -> nn.Module:
    """The base model again, with all adapters kept for `activate`; returns the same model."""
    return pipeline("deactivate")(model).model


@contextmanager
def active(model: nn.Module, *names: str | Mapping[str, float]) -> Iterator[nn.Module]:
    """Inside, exactly these adapters act, as after `activate`, which also takes strengths; then all are as they were,
    ``requires_grad`` too.

    Blocks nest. An adapter that is applied or loaded inside stays, as it then is.

    Raises:
        AdapterError: as in `activate`.
        PlanError: the model is folded, before or at the end.
        LoraFxError: a thread is inside a forward of the model.
    """
    before = acting(model)
    activate(model, *names)
    try:
        yield model
    finally:
        Pipeline("restore", (Restore(before), Rewrite()))(model)


def disabled(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside, no adapter acts: the base model, bit for bit, as a reference for preference training needs it."""
    return active(model)


def remove(model: nn.Module, *names: str) -> nn.Module:
    """Take these adapters out for good. When the last one is gone, every module has its original class.

    Returns:
        The same model.

    Raises:
        AdapterError: there is no adapter of a name, or no name is given.
        LoraFxError: a thread is inside a forward of the model.
    """
    return pipeline("remove", *names)(model).model


def rename(model: nn.Module, old: str, new: str) -> nn.Module:
    """Call an adapter something else. Its parameters are the same objects, so optimizers go on, under other names in
    the `state_dict`; whether it acts, and how strongly, stays.

    Returns:
        The same model.

    Raises:
        AdapterError: there is no adapter `old`, there is one `new` already, or that is no identifier.
        PlanError: the model is folded.
        LoraFxError: a thread is inside a forward of the model.
    """
    return pipeline("rename", old, new)(model).model


def fold(model: nn.Module, *, copy: bool = False, final: bool = False) -> nn.Module:
    """Fold the active adapters into the weights (the LoRA papers say *merge*), each storage once, rounded once.

    Args:
        copy: fold a copy, and leave `model` alone.
        final: keep nothing for `unfold`. Otherwise what rounding took away is kept: see `kept_bytes`.

    Returns:
        The model, or its copy: its original classes, the base model's `state_dict` keys, other numbers.

    Raises:
        FoldError: there is no active adapter, or a factor or sum is not finite; nothing has been written then.
        LoraFxError: a thread is inside a forward of the model.
    """
    if copy:
        with in_turn():
            model = copied(model)
    return pipeline("fold", final)(model).model


def unfold(model: nn.Module) -> nn.Module:
    """Undo `fold`: every weight bitwise as before, the branches back in place.

    Returns:
        The same model.

    Raises:
        FoldError: the model is not folded, or its fold was final.
        LoraFxError: a thread is inside a forward of the model.
    """
    return pipeline("unfold")(model).model


def switch(model: nn.Module, *names: str | Mapping[str, float]) -> nn.Module:
    """Fold these adapters, at these strengths, for those that are folded now, through the exact base weights.

    Returns:
        The same model.

    Raises:
        AdapterError: as in `activate`.
        FoldError: a fold is refused; see `fold`, `unfold`.
    """
    return pipeline("switch", *names)(model).model
