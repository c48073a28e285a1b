"""The laws of a kind, over random models: what whoever writes one tests it with."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from lora_fx.analysis.rules import Rule
from lora_fx.application import apply, certify, fold, plan, remove
from lora_fx.checks.oracles import delta
from lora_fx.checks.verification import run, verify
from lora_fx.deltas.kinds import kind_named
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import FoldError, LoraFxError
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.graph.capture import Inputs, no_fast_paths, normalize_inputs, output_tensors
from lora_fx.model.classes import is_wired
from lora_fx.model.inventory import inventory
from lora_fx.testing import comparing
from lora_fx.testing.assertions import assert_folds_exactly
from lora_fx.testing.random_models import BLOCKS, DTYPES, RandomModel, fit
from lora_fx.testing.strategies import adapters, models, rules_for


def assert_kind(kind: str, data: Any) -> None:
    """The laws of a kind hold on one random model, with rules and θ that are drawn for it.

    A freshly adapted model is the base, bit for bit; with another θ it is the model with W + δ in its weights, as is
    each use; each tensor of θ gets a gradient, and no other; the fold is W + δ rounded once, leaves the base's
    graph and is undone to the bit; saved and loaded it is the same model. Of a kind that is no delta each use is what
    the kind makes of it, and a fold is refused, and removed it leaves the base, both to the bit.

    Args:
        kind: its name.
        data: of ``@given(st.data())``.

    Raises:
        AssertionError: a law does not hold; it shows the model, as a program that can be pasted.
    """
    blocks = _LOOKUPS if kind == "tokens" else BLOCKS
    model, example = data.draw(_layers() if kind_named(kind).behind else models(blocks=blocks))
    base, inputs = model.requires_grad_(False), normalize_inputs(model, example)
    rewrites = not kind_named(kind).is_delta
    rules = _rewriting(base, example, kind, data) if rewrites else data.draw(rules_for(base, example, kinds=(kind,)))
    adapted = apply(copy.deepcopy(base), rules, example)
    with no_fast_paths():
        same = all(map(torch.equal, run(base, inputs), run(adapted, inputs)))
    _require(same, "a freshly adapted model is not the base, bit for bit", base, rules)
    data.draw(adapters(sizes=(1.0, 0.25)))(adapted)
    report = rewrites or verify(_dense(base, adapted), adapted, inputs)
    _require(bool(report), f"it is not the model with W + δ in its weights: {report}", base, rules)
    certificate = certify(adapted, inputs, gradients=False)
    right = all(row.error <= row.bound and row.realised != Realisation.MISSED for row in certificate.rows)
    _require(right and all(certificate.whole), f"a use is not W + δ:\n{certificate}", base, rules)
    _check_gradients(base, adapted, inputs, rules)
    if not rewrites:
        assert_folds_exactly(adapted, example)
    fresh = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, folder, peft=False)
        load_adapter(fresh, folder, example)
    before, after = comparing.bits(adapted), comparing.bits(fresh)
    changed = [name for name in before if name not in after or not comparing.same_bits(before[name], after[name])]
    _require(not changed and len(before) == len(after), f"{changed}: saved and loaded it is another one", base, rules)
    if rewrites:
        _check_no_fold(base, adapted, rules)


_LOOKUPS = [block for block in BLOCKS if block.reads_ids] * 8 + [block for block in BLOCKS if not block.reads_ids][:2]

#: kind → settings of which each has another θ
_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "bottleneck": [
        {"rank": 1},
        {"rank": 3, "settings": {"activation": "tanh"}},
        {"rank": 2, "settings": {"norm": True, "activation": "silu"}},
    ],
    "compacter": [{"rank": 2, "settings": {"n": 2}}, {"rank": 3, "settings": {"n": 1, "factors": 2, "norm": True}}],
    "tokens": [{"settings": {"prefix": 2, "infix": 1}}],
    "prefix_layer": [
        {"settings": {"prefix": 2, "infix": 1}},
        {"settings": {"infix": 1, "blocks": "parts.*"}},
        {"settings": {"prefix": 3, "blocks": "parts.0"}},
    ],
}


class _Part(nn.Module):
    """A random model on its own width, as a block of a larger one."""

    def __init__(self, model: RandomModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        first: Any = self.model.blocks[0]
        y = self.model(fit(h, h.shape[-1], first.inputs))
        y = y if y.shape[1] == h.shape[1] else y.mean(1, keepdim=True)
        return h + fit(y, y.shape[-1], h.shape[-1])


class _Layers(nn.Module):
    """A table, and blocks that keep its width."""

    def __init__(self, rows: int, width: int, parts: list[RandomModel]) -> None:
        super().__init__()
        self.table, self.parts = nn.Embedding(rows, width), nn.ModuleList(map(_Part, parts))
        self.table.to(next(parts[0].parameters()).dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        for part in self.parts:
            h = part(h)
        return h


@st.composite
def _layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[torch.Tensor]]:
    own: Any = {"blocks": [b for b in BLOCKS if not b.reads_ids], "dtypes": (draw(st.sampled_from(DTYPES)),)}
    parts = [draw(models(**own, max_blocks=2))[0] for _ in range(draw(st.integers(1, 2)))]
    rows, width = draw(st.sampled_from((5, 2, 7))), draw(st.sampled_from((3, 2, 4)))
    batch, tokens = draw(st.sampled_from(((2, 3), (1, 5), (3, 2), (2, 1))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        model = _Layers(rows, width, parts).train(parts[0].training)
    return model, (((torch.arange(batch * tokens) + 1) % rows).reshape(batch, tokens),)


def _rewriting(base: nn.Module, example: Any, kind: str, data: Any) -> list[Rule]:
    """A rule for some of the weights that can have it; LoRA on others."""
    settings = data.draw(st.sampled_from(_SETTINGS[kind]))
    role = "embedding" if "prefix" in kind_named(kind).settings else None  # of a tied table the lookup alone
    try:
        rows = plan(base, Rule(where="*", role=role, kind=kind, otherwise="skip", **settings), example).rows
    except LoraFxError:  # no weight can
        rows = ()
    normed = settings.get("settings", {}).get("norm")  # one number less its mean is 0: no gradient is right then
    able = [row for row in rows if not (normed and row.out == 1)]
    assume(able)
    chosen = data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=4, unique_by=id))
    rules = [Rule(where=" | ".join(row.weight.name for row in chosen), role=role, kind=kind, **settings)]
    others = [row for row in able if row not in chosen]
    if kind_named(kind).behind:
        with contextlib.suppress(LoraFxError):
            others = [*plan(base, Rule(where="parts.*", rank=1, otherwise="skip"), example).rows]
    return [*rules, Rule(where=others[0].weight.name, rank=1)] if others and data.draw(st.booleans()) else rules


def _check_no_fold(base: nn.Module, adapted: nn.Module, rules: Any) -> None:
    before = comparing.bits(adapted)
    try:
        fold(adapted)
    except FoldError:
        pass
    else:
        _require(False, "it folds, and is no delta", base, rules)
    same = all(comparing.same_bits(own, before[name]) for name, own in comparing.bits(adapted).items())
    _require(same, "a refused fold changes it", base, rules)
    remove(adapted, "default")
    plain, left = comparing.bits(base), comparing.bits(adapted)
    same = plain.keys() == left.keys() and all(comparing.same_bits(own, left[name]) for name, own in plain.items())
    _require(same and not is_wired(adapted), "removed it leaves another model than the base", base, rules)


def _dense(base: nn.Module, adapted: nn.Module) -> nn.Module:
    """The base with W + Σ δ in the place of each adapted weight; those that are read differently apart."""
    dense, twins = copy.deepcopy(base), dict[Any, nn.Parameter]()
    acting = inventory(adapted).by_weight(active=True)
    for name, adapters_there in acting.items():
        weight = base.get_parameter(name)
        key = id(weight), *map(id, adapters_there)
        if key not in twins:
            total = weight.detach().to(torch.float64) + delta(weight, *adapters_there)
            twins[key] = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        path, _, attribute = name.rpartition(".")
        setattr(dense.get_submodule(path), attribute, twins[key])
    return dense


def _check_gradients(base: nn.Module, adapted: nn.Module, inputs: Inputs, rules: Any) -> None:
    """Where the base's own weight would get a gradient, each tensor of θ does."""
    free = copy.deepcopy(base).requires_grad_(True)
    try:
        reached = _with_gradient(free, inputs)
    except RuntimeError:  # the base itself has no backward on these inputs: torch's grouped_mm wants strides
        return
    found = _with_gradient(copy.deepcopy(adapted), inputs)
    wanted = {
        f"{place.path}.{place.child}.{name}".lstrip(".")
        for place in inventory(adapted).places
        if place.child in place.owner._modules and place.weight in reached
        for name in place.adapter._parameters
        if not place.adapter.kind.new_ids(place.adapter.settings)  # no index asks for one
        and name not in place.adapter.kind.frozen
    }
    _require(not wanted - found, f"no gradient reaches {', '.join(sorted(wanted - found))}", base, rules)
    trained = {name for name, p in adapted.named_parameters(remove_duplicate=False) if p.requires_grad}
    theta = {name for name in trained if "_lora_default" in name}
    _require(trained == theta, f"{', '.join(sorted(trained - theta))} of the base is trained", base, rules)


def _with_gradient(model: nn.Module, inputs: Inputs) -> set[str]:
    """Every name of the parameters that a random cotangent on the outputs reaches."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [t for t in output_tensors(inputs.call(model)) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in outputs).backward()  # type: ignore[union-attr]  # no output: no adapter
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p.grad is not None and bool((p.grad != 0).any())}


def _require(holds: bool, message: str, model: nn.Module, rules: Any) -> None:
    if not holds:
        raise AssertionError(f"{message}\n{model!r}\nwith {rules}")
