"""Adapter files: PEFT reads what we save, we read what PEFT saves, and every damaged file is refused."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Adapter, Rule
from lora_fx.errors import AdapterError, FileError, LoraFxError
from lora_fx.export.adapters import files as adapter_files
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model.inventory import inventory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's
torch.set_num_threads(1)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Linears(nn.Module):
    """`lin` is also how the path of `tower.lin` ends."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.tower, self.head = nn.Linear(6, 9), nn.ModuleDict({"lin": nn.Linear(9, 7)}), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower["lin"](self.lin(x).relu()).relu())


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(11, 6), Conv1D(9, 6), nn.Linear(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(self.table(ids)).relu())


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 5, 3, padding=1), nn.Conv2d(5, 7, (3, 2), stride=2, padding=(1, 0))
        self.three = nn.Conv3d(7, 4, (1, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x).relu().unsqueeze(-1).expand(-1, -1, -1, 6))
        return self.three(x.unsqueeze(-1).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Expert(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 8, 6), (3, 5, 8)
        self.up = nn.Parameter(torch.randn(up if not transposed else (3, 6, 8)) / 3)
        self.down = nn.Parameter(torch.randn(down if not transposed else (3, 8, 5)) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.bmm(torch.bmm(x, up).relu(), down)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 6) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class Experts(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.raw, self.experts = Raw(), Expert(transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.raw(x).expand(3, -1, -1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.table(ids)).tanh())


class Warm(nn.Linear):
    """PEFT would add its branch behind the temperature."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.register_buffer("t", torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) * self.t.exp() + self.bias


class Next(nn.Embedding):
    """PEFT would look its branch up with the ids as they come."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)


def doubled(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return 2 * out


class OwnForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.warm, self.hooked = Next(11, 6), Warm(6, 9), nn.Linear(9, 8)
        self.replaced, self.plain = nn.Linear(8, 7), nn.Linear(7, 4)
        self.hooked.register_forward_hook(doubled)
        self.replaced.forward = functools.partial(nn.Linear.forward, self.replaced)  # as good as any other

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.plain(self.replaced(self.hooked(self.warm(self.table(ids)).tanh())).tanh())


class Padded(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (1, 1)))


class Cast(nn.Conv1d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return super()._conv_forward(x * 2, weight, bias)


class Looking(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.tanh(), x, x, need_weights=False)[0]


class OwnConvs(nn.Module):
    """Their weights are no raw parameters either that PEFT could take."""

    def __init__(self) -> None:
        super().__init__()
        self.padded, self.cast, self.hooked = Padded(6, 5, 3), Cast(5, 4, 1), nn.Conv1d(4, 8, 1)
        self.looking = Looking(8, 2, batch_first=True)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.looking(self.hooked(self.cast(self.padded(x))).transpose(1, 2))


def falcon() -> nn.Module:
    size = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=17)
    return FalconForCausalLM(FalconConfig(**size, hidden_dropout=0.0, attention_dropout=0.0, bias=True))


def gemma() -> nn.Module:
    size = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return GemmaForCausalLM(GemmaConfig(**size, head_dim=4, vocab_size=17, tie_word_embeddings=False))


def gpt2() -> nn.Module:
    size = dict(n_embd=12, n_layer=2, n_head=2, vocab_size=17, n_positions=9)
    return GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def mixtral() -> nn.Module:
    size = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = MixtralConfig(**size, vocab_size=17, num_local_experts=3, num_experts_per_tok=2)
    return MixtralForCausalLM._from_config(config, experts_implementation="eager")  # grouped_mm has no float64


def fresh(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().to(dtype)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def fill(parameters: Any) -> None:
    """B ≠ 0, with deltas about as large as the weights."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)


def adapted(make: Callable[[], nn.Module], rules: Any, x: Any = None, **settings: Any) -> nn.Module:
    model = lora_fx.apply(fresh(make), rules, x, **settings)
    fill(p for m in model.modules() if isinstance(m, Adapter) for p in m.parameters())
    return model


def adapters(model: nn.Module) -> dict[str, tuple]:
    """Everything an adapter is, by where it stands."""
    return {
        f"{place.path}.{place.child}": (
            a.A,
            a.B,
            a.rank,
            a.alpha,
            a.scaling,
            a.dropout.p,
            a.rows,
            a.name,
            a.role,
            a.layout,
        )
        for place in inventory(model).places
        for a in [place.adapter]
    }


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = adapters(a), adapters(b)
    assert list(left) == list(right)
    for key in left:
        assert left[key][2:] == right[key][2:]
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(left[key][:2], right[key][:2], strict=True))
    assert list(a.state_dict()) == list(b.state_dict())


def state(model: nn.Module) -> dict[str, Any]:
    """What a refused call must leave as it was."""
    return {
        **{key: value.clone() for key, value in model.state_dict().items()},
        **{f"{key} trains": p.requires_grad for key, p in model.named_parameters()},
        **{f"{key} is": type(m) for key, m in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ── both directions ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Case:
    make: Callable[[], nn.Module]
    x: Any
    rules: list[Rule]
    config: dict[str, Any] = field(default_factory=dict)


TWO = dict(rank=2, alpha=3)
CASES = {
    "linear": Case(
        Linears, numbers(4, 6), [Rule(where="*", dropout=0.25, **TWO)], dict(target_modules=["lin", "head"])
    ),
    "patterns": Case(
        Linears,
        numbers(4, 6),
        [Rule(where="lin", rank=3, alpha=1.7), Rule(where="*", rank=1, alpha=2)],
        dict(target_modules=r".*lin|head", rank_pattern={"^lin": 3, r"tower\.lin": 1}, alpha_pattern={"lin": 5}),
    ),
    "one of two": Case(Linears, numbers(4, 6), [Rule(where="lin", **TWO)], dict(target_modules="tower.lin")),
    "rslora": Case(
        Linears, numbers(4, 6), [Rule(where="*", scaling="rslora", **TWO)],
        dict(target_modules="all-linear", use_rslora=True),
    ),
    "two scalings": Case(
        Linears, numbers(4, 6), [Rule(where="head", scaling="rslora", **TWO), Rule(where="*", rank=3)],
        dict(target_modules=["lin"], exclude_modules=["tower.lin"]),
    ),
    "text": Case(
        Text, IDS, [Rule(where="table", rank=3), Rule(where="*", **TWO)], dict(target_modules=["table", "mix", "out"])
    ),
    "conv": Case(
        Convs, numbers(2, 3, 8), [Rule(where="*", **TWO)],
        dict(target_modules=["one", "two", "three"], lora_dropout=0.1),
    ),
    "attention": Case(
        Attention, numbers(2, 4, 12), [Rule(where="attention.in_proj*", rank=4, alpha=12), Rule(where="*", **TWO)],
        dict(target_modules=["attention", "out"]),
    ),
    "attention in": Case(Attention, numbers(2, 4, 12), [Rule(where="attention.in_proj*", **TWO)]),
    "experts": Case(
        Experts, numbers(4, 7), [Rule(where="raw*", rank=3), Rule(where="*", **TWO)],
        dict(target_modules=[], target_parameters=["experts.up", "down", "raw.w"], rank_pattern={"up": 3}),
    ),
    "experts turned": Case(
        lambda: Experts(True), numbers(4, 7), [Rule(where="*", **TWO)],
        dict(target_modules=[], target_parameters=["experts.down"]),
    ),
    "tied": Case(Tied, IDS, [Rule(where="*", **TWO)], dict(target_modules=["table", "mix", "head"])),
    "one of tied": Case(
        Tied, IDS, [Rule(where="mix", **TWO), Rule(form="embedding", **TWO)], dict(target_modules=["head"])
    ),
    "gpt2": Case(
        gpt2, {"input_ids": IDS}, [Rule(where="*c_attn", rank=3, alpha=4, layers="1"), Rule(where="*", **TWO)],
        dict(target_modules=["c_attn", "c_fc", "wte"], layers_to_transform=[1], layers_pattern="h"),
    ),
    "query and value": Case(
        gpt2, {"input_ids": IDS}, [Rule(role="attention.query | attention.value", rank=3, alpha=4)]
    ),
    "two scales": Case(
        gpt2, {"input_ids": IDS},
        [Rule(role="attention.query", rank=1, alpha=3), Rule(role="attention.value", rank=2, alpha=3)],
    ),
    "own forwards": Case(
        OwnForwards, IDS, [Rule(where="plain", rank=3), Rule(where="*", **TWO)],
        dict(target_modules=["plain"], target_parameters=["warm.weight", "table.weight"]),
    ),
    "falcon": Case(
        falcon, {"input_ids": IDS}, [Rule(where="*query_key_value", dropout=0.1, **TWO)],
        dict(target_modules=["query_key_value", "dense"], lora_dropout=0.1),
    ),
    "gemma": Case(
        gemma, {"input_ids": IDS}, [Rule(where="*embed_tokens", rank=3), Rule(where="*q_proj", **TWO)],
        dict(target_modules=["embed_tokens", "v_proj"]),
    ),
    "mixtral": Case(
        mixtral, {"input_ids": IDS}, [Rule(where="*experts*", **TWO), Rule(where="*_proj", rank=3)],
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peft_reads_what_we_save(case: Case, tmp_path: Path) -> None:
    ours = adapted(case.make, case.rules, case.x)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(fresh(case.make), tmp_path / "a").eval()
    assert lora_fx.verify(ours, theirs, case.x)
    assert not lora_fx.verify(fresh(case.make), theirs, case.x)
    written, read = load_file(tmp_path / "a" / TENSORS), peft.get_peft_model_state_dict(theirs)
    assert set(written) == {key for key in read if "lora_" in key}
    assert all(torch.equal(value, read[key]) for key, value in written.items())
    again = load_adapter(fresh(case.make), tmp_path / "a", case.x)
    assert_same(ours, again)
    assert lora_fx.verify(ours, again, case.x).error == 0
    retensor(tmp_path / "a", lambda tensors: None)
    assert lora_fx.verify(ours, load_adapter(fresh(case.make), tmp_path / "a"), case.x)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.config], ids=[n for n, c in CASES.items() if c.config])
def test_we_read_what_peft_saves(case: Case, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(fresh(case.make), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **case.config})).eval()
    fill(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(fresh(case.make), tmp_path / "a", case.x)
    assert lora_fx.verify(theirs, ours, case.x)
    assert not lora_fx.verify(theirs, fresh(case.make), case.x)


@pytest.mark.parametrize("name", ["text", "attention"])
def test_dropout_that_peft_ignores(name: str, tmp_path: Path) -> None:
    """PEFT drops nothing on embeddings and attention, whatever the config says."""
    case = CASES[name]
    config = peft.LoraConfig(r=2, lora_dropout=0.25, **case.config)
    peft.get_peft_model(fresh(case.make), config).save_pretrained(tmp_path)
    model = load_adapter(fresh(case.make), tmp_path)
    dropped = {f"{p.path}.{p.child}" for p in inventory(model).places if p.adapter.dropout.p == 0.25}
    assert dropped == {n for n in adapters(model) if not n.startswith(("table", "attention"))}


def test_equal_adapters_on_a_tied_weight_are_one(tmp_path: Path) -> None:
    ours = adapted(Tied, CASES["tied"].rules, IDS)
    save_adapter(ours, tmp_path)
    retensor(tmp_path, lambda tensors: None)  # as PEFT would write it
    again = load_adapter(fresh(Tied), tmp_path, IDS)
    assert list(again.state_dict()) == list(ours.state_dict())
    assert again.table.weight_lora_default is again.head.weight_lora_default


@pytest.mark.parametrize("version, trained", [("0.22.0", True), ("0.22.0", False), ("0.18.1", True), (None, True)])
def test_attention_of_a_newer_peft(version: str | None, trained: bool, tmp_path: Path) -> None:
    """Up to 0.21 PEFT adds the delta of out_proj twice; what a later one does is not known."""
    theirs = peft.get_peft_model(
        fresh(Attention), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attention"])
    ).eval()
    fill(p for n, p in theirs.named_parameters() if "lora_" in n and (trained or "out_proj" not in n))
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, peft_version=version)
    if version == "0.22.0" and trained:
        refused(lambda: load_adapter(fresh(Attention), tmp_path), "0.22.0", "peft_version", "twice", "merge_and_unload")
    else:
        assert lora_fx.verify(theirs, load_adapter(fresh(Attention), tmp_path), numbers(2, 4, 12))


# ── what only our own format can say ─────────────────────────────────────────────────────────────────────────────────


class Odd(nn.Module):
    """Weights for which PEFT has no word, or would compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.dilated = nn.Conv1d(4, 6, 3, groups=2, padding=1), nn.Conv1d(6, 8, 3, padding=2, dilation=2)
        self.up, self.lstm = nn.ConvTranspose1d(8, 5, 2), nn.LSTM(5, 4, batch_first=True)
        self.read, self.named = nn.Linear(4, 7), nn.Linear(7, 6)
        self.again, self.top = self.named, nn.Parameter(torch.randn(6, 3) / 3)
        self.heads = nn.ParameterDict({"w": torch.randn(3, 2, 5) / 3})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.dilated(self.grouped(x).relu())).transpose(1, 2)
        x = self.again(F.linear(self.lstm(x)[0], self.read.weight)) @ self.top
        return torch.einsum("bti,ihd->bthd", x, self.heads["w"])


ODD = {
    "grouped": "one group", "dilated": "no dilation", "up": "ConvTranspose1d", "lstm.weight_ih_l0": "LSTM",
    "read": "a module inside it", "named": "named = again", "top": "the model itself",
    "heads.w": "the w of ParameterDict",
}  # fmt: skip


@pytest.mark.parametrize("where, reason", ODD.items())
def test_what_peft_cannot_say(where: str, reason: str, tmp_path: Path) -> None:
    x = numbers(2, 4, 6)
    ours = adapted(Odd, [Rule(where=where, rank=2, alpha=3)], x)
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, remedy="peft=False")
    assert not list(tmp_path.iterdir())
    save_adapter(ours, tmp_path / "a", peft=False)
    assert_same(ours, load_adapter(fresh(Odd), tmp_path / "a", x))
    with pytest.raises(KeyError, match="LORA_FX"):
        peft.PeftModel.from_pretrained(fresh(Odd), tmp_path / "a")


OUTSIDE = {
    "padded": "Padded has a forward of its own", "cast": "Cast has a _conv_forward of its own",
    "hooked": "it has the hook OwnConvs", "looking.in_proj*": "Looking has a forward of its own",
    "looking.out_proj": "Looking has a forward of its own",
}  # fmt: skip


@pytest.mark.parametrize("where, reason", OUTSIDE.items())
def test_what_peft_would_add_outside_of_a_forward(where: str, reason: str, tmp_path: Path) -> None:
    x = numbers(2, 6, 4)
    ours = adapted(OwnConvs, [Rule(where=where, rank=2, alpha=3)], x)
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, why="PEFT adds the branch outside", remedy="peft=False")
    save_adapter(ours, tmp_path / "a", peft=False)
    assert_same(ours, load_adapter(fresh(OwnConvs), tmp_path / "a", x))


@pytest.mark.parametrize(
    "make, x, target, reason",
    [
        (OwnForwards, IDS, "warm", "Warm has a forward of its own"),
        (OwnForwards, IDS, "table", "Next has a forward of its own"),
        (OwnForwards, IDS, "hooked", "it has the hook doubled"),
        (OwnForwards, IDS, "replaced", "its forward is replaced on the instance"),
        (OwnConvs, numbers(2, 6, 4), "padded", "Padded has a forward of its own"),
        (OwnConvs, numbers(2, 6, 4), "looking", "Looking has a forward of its own"),
    ],
)
def test_what_peft_adds_outside_of_a_forward_is_not_read(
    make: Any, x: Any, target: str, reason: str, tmp_path: Path
) -> None:
    peft.get_peft_model(fresh(make), peft.LoraConfig(r=2, target_modules=[target])).save_pretrained(tmp_path)
    model = fresh(make)
    before = state(model)
    refused(lambda: load_adapter(model, tmp_path, x), reason, "target_modules", "PEFT adds the branch outside")
    assert_untouched(model, before)


def test_accelerates_hooks_change_nothing_that_peft_adds_to(tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    def make() -> nn.Module:
        model = Linears()
        hooks.add_hook_to_module(model.lin, hooks.SequentialHook(hooks.AlignDevicesHook(execution_device="cpu")))
        return model

    ours = adapted(make, [Rule(where="lin", **TWO)], numbers(4, 6))
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "lin"
    assert lora_fx.verify(ours, peft.PeftModel.from_pretrained(fresh(make), tmp_path).eval(), numbers(4, 6))


def test_a_weight_that_is_computed_takes_no_file_of_pefts(tmp_path: Path) -> None:
    peft.get_peft_model(fresh(Linears), peft.LoraConfig(r=2, target_modules=["head"])).save_pretrained(tmp_path)
    model = fresh(Linears)
    nn.utils.parametrizations.weight_norm(model.head)
    refused(lambda: load_adapter(model, tmp_path, numbers(4, 6)), "something computes it", "head.weight")


MIXED = {
    "scales": (gpt2, {"input_ids": IDS}, [Rule(role="*.query", rank=1, alpha=3), Rule(role="*.value", rank=2)],
               "transformer.h.0.attn.c_attn.weight", "no power of two"),
    "dropouts": (Linears, numbers(4, 6), [Rule(where="lin", rank=2, dropout=0.5), Rule(where="*", rank=2)],
                 "lin", "0, 0.5"),
    "dropped parameter": (Experts, numbers(4, 7), [Rule(where="*", rank=2, dropout=0.5)], "raw.w", "dropout=0.5"),
    "fused encoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), numbers(2, 3, 6),
                      [Rule(where="*linear1", rank=2)], "0.linear1.weight", "TransformerEncoderLayer"),
    "turned attention": (lambda: nn.ModuleDict({"a": Attention(), "c": Conv1D(4, 5)}), None,
                         [Rule(where="c | a.attention.in_proj*", rank=2)], "c", "fan_in_fan_out"),
}  # fmt: skip


@pytest.mark.parametrize("make, x, rules, place, reason", MIXED.values(), ids=MIXED)
def test_what_peft_cannot_say_together(make: Any, x: Any, rules: Any, place: str, reason: str, tmp_path: Path) -> None:
    ours = adapted(make, rules, x)
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, place, remedy="peft=False")
    save_adapter(ours, tmp_path / "a", peft=False)
    assert_same(ours, load_adapter(fresh(make), tmp_path / "a", x))


def test_peft_would_renormalise_the_factors_of_a_table(tmp_path: Path) -> None:
    ours = adapted(lambda: nn.Sequential(nn.Embedding(17, 5)), [Rule(where="*", rank=2)], None)
    ours[0].max_norm = 1.0
    refused(lambda: save_adapter(ours, tmp_path / "a"), "max_norm", "0.weight", remedy="peft=False")


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["linear", "text", "query and value", "experts", "tied"])
def test_without_example_inputs(name: str, tmp_path: Path) -> None:
    """The file says how each weight is read: nothing has to be captured."""
    case = CASES[name]
    ours = adapted(case.make, case.rules, case.x)
    save_adapter(ours, tmp_path / "a")
    again = load_adapter(fresh(case.make), tmp_path / "a")
    assert_same(ours, again)
    assert lora_fx.verify(ours, again, case.x)


def test_weights_that_the_inputs_do_not_reach(tmp_path: Path) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), Conv1D(4, 6)

        def forward(self, x: torch.Tensor, other: bool = False) -> torch.Tensor:
            return self.b(x) if other else self.a(x)

    ours = adapted(Either, [Rule(where="a | b", rank=2)])
    save_adapter(ours, tmp_path / "a")
    again = load_adapter(fresh(Either), tmp_path / "a", numbers(3, 6))
    for inputs in (numbers(3, 6),), (numbers(3, 6), True):
        assert lora_fx.verify(ours, again, inputs)


@pytest.mark.parametrize("dtype, kept", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_dtypes(dtype: torch.dtype, kept: torch.dtype, tmp_path: Path) -> None:
    ours = lora_fx.apply(fresh(Linears, dtype), [Rule(where="*", **TWO)], numbers(4, 6).to(dtype))
    fill(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "a")
    assert {t.dtype for t in load_file(tmp_path / "a" / TENSORS).values()} == {kept}
    assert_same(ours, load_adapter(fresh(Linears, dtype), tmp_path / "a", numbers(4, 6).to(dtype)))


def test_names(tmp_path: Path) -> None:
    """PEFT puts named adapters into subfolders; several adapters live in one model."""
    theirs = peft.get_peft_model(
        fresh(Linears), peft.LoraConfig(r=2, target_modules=["head"]), adapter_name="mine"
    ).eval()
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapted(Linears, [Rule(where="head", rank=1)], numbers(4, 6), name="second")
    save_adapter(ours, tmp_path / "ours", name="second")

    model = load_adapter(fresh(Linears), tmp_path / "theirs", numbers(4, 6))
    assert lora_fx.verify(theirs, model, numbers(4, 6))
    load_adapter(model, tmp_path / "ours", numbers(4, 6))
    load_adapter(model, tmp_path / "ours", numbers(4, 6), name="third")
    assert list(lora_fx.adapters(model)) == ["default", "second", "third"]
    before = state(model)
    refused(lambda: load_adapter(model, tmp_path / "ours"), "'second'", "Linears", "already has", "any other name")
    refused(lambda: load_adapter(model, tmp_path / "ours", name="4th"), "'4th'", "name", "identifier", "letters")
    save_adapter(model, tmp_path / "more", name="third")
    refused(lambda: load_adapter(model, tmp_path), "it holds more, ours", str(tmp_path), remedy="one adapter")
    with pytest.raises(AdapterError, match="there is no adapter named 'fourth'") as caught:
        save_adapter(model, tmp_path / "b", name="fourth")
    assert "default, second, third" in caught.value.remedy
    assert_untouched(model, before)
    folded = lora_fx.fold(model)
    refused(lambda: load_adapter(folded, tmp_path / "ours", name="fourth"), "folded", "Linears", remedy="unfold")
    refused(lambda: save_adapter(folded, tmp_path / "b"), "'default' is folded", "Linears", remedy="unfold")


def test_the_spelling_of_before_still_works(tmp_path: Path) -> None:
    """The name without its keyword, with a warning that shows the caller's line."""
    ours = adapted(Linears, [Rule(where="head", rank=1)], numbers(4, 6), name="task")
    save_adapter(ours, tmp_path / "new", name="task")
    with pytest.warns(DeprecationWarning, match="save_adapter\\(model, path, name=…\\)") as seen:
        save_adapter(ours, tmp_path / "old", "task")
    assert seen[0].filename == __file__
    old, new = (load_file(tmp_path / folder / TENSORS) for folder in ("old", "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    with pytest.raises(TypeError):
        save_adapter(ours, tmp_path / "old", "task", "other")  # two names


def test_training_goes_on(tmp_path: Path) -> None:
    """A loaded adapter trains as a fresh one does: it, and nothing else."""
    save_adapter(adapted(Linears, [Rule(where="*", **TWO)], numbers(4, 6)), tmp_path / "a")
    model = load_adapter(fresh(Linears), tmp_path / "a", numbers(4, 6))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in model.state_dict() if "_lora_" in n
    }


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("as_peft", [True, False])
def test_a_wrapped_model_is_saved_under_the_names_of_its_own(tmp_path, as_peft):
    """As after training: `torch.compile` around the model, a checkpoint wrapper around a part of it."""

    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3)))

    x = torch.randn(2, 4)
    model = adapted(make, Rule(where="*.weight", rank=2), x)
    save_adapter(model, tmp_path / "plain", peft=as_peft)
    expected = load_adapter(fresh(make), tmp_path / "plain", x)(x)
    assert torch.equal(expected, model(x)) and not torch.equal(expected, fresh(make)(x))
    model[1] = checkpoint_wrapper(model[1])
    for way, wrapped in (("compiled", torch.compile(model)), ("parallel", nn.DataParallel(model))):
        save_adapter(wrapped, tmp_path / way, peft=as_peft)
        assert load_file(tmp_path / way / TENSORS).keys() == load_file(tmp_path / "plain" / TENSORS).keys()
        assert torch.equal(load_adapter(fresh(make), tmp_path / way, x)(x), expected)


def refused(call: Callable[[], Any], reason: str, place: str = "", why: str = "", remedy: str = "") -> None:
    with pytest.raises(FileError) as caught:
        call()
    error = caught.value
    assert reason in error.reason and why in error.reason, error
    assert place in error.place and error.place, error
    assert remedy in error.remedy and error.remedy, error


def edit(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **options}))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors as PEFT would write them, without our header."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter that PEFT has written."""
    theirs = peft.get_peft_model(fresh(Linears), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lin", "head"]))
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


HEAD = "base_model.model.head.lora_A.weight"
OPTIONS = {
    "use_dora": (1, "true or false"), "lora_bias": (1, "true or false"), "bias": ("some", "'all' or 'lora_only'"),
    "modules_to_save": ("head", "list of names"), "layer_replication": ([[0, 1]], "how many layers"),
    "trainable_token_indices": ([3], "which of its modules"), "alora_invocation_tokens": ([1], "after certain tokens"),
    "use_qalora": (True, "pooled"), "init_lora_weights": ("pissa_niter_4", "base weights"),
    "kasa_config": ({"beta": 1}, "does not know"), "from_the_future": (3, "does not know"),
    "ensure_weight_tying": (1, "true or false"), "peft_type": ("LOHA", "no LoRA"),
    "r": ("8", "positive integer"), "lora_alpha": (float("inf"), "finite number"),
    "lora_dropout": (1.5, "probability"), "use_rslora": (1, "true or false"),
    "target_modules": (["nowhere"], "'nowhere'"), "target_parameters": ("lin", "list of names"),
    "rank_pattern": ({"(": 2}, "no pattern"), "alpha_pattern": ({"lin": "x"}, "finite numbers"),
    "layers_to_transform": ([True], "integer"),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_are_refused(option: str, saved: Path) -> None:
    value, why = OPTIONS[option]
    edit(saved, **{option: value})
    model = fresh(Linears)
    before, written = state(model), files(saved)
    refused(lambda: load_adapter(model, saved), why, f"{CONFIG}, {option}")
    assert_untouched(model, before)
    assert files(saved) == written


def drop(key: str) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, lambda t: t.pop(key))


def put(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, lambda t: t.update({key: value}))


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


DAMAGE = {
    "no folder": (lambda f: os.rename(f, f.parent / "b"), "no such folder", "a"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}", "a"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "cannot be read", TENSORS),
    "no pickle": (pickled, "torch.save", "adapter_model.bin"),
    "half a config": (cut(CONFIG, 50), "cannot be read", CONFIG),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "a list", CONFIG),
    "bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "cannot be read", CONFIG),
    "deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be read", CONFIG),
    "empty": (cut(TENSORS, 0), "cannot be read", TENSORS),
    "half a header": (cut(TENSORS, 60), "cannot be read", TENSORS),
    "half of it": (cut(TENSORS, 500), "cannot be read", TENSORS),
    "a missing key": (drop(HEAD), "missing", HEAD),
    "an extra key": (put("base_model.model.extra.lora_A.weight", torch.ones(2, 3)), "no layer", "extra"),
    "another place": (put("../../etc/passwd", torch.ones(2)), "no layer", "../../etc/passwd"),
    "another layer": (put("base_model.model.tower.lora_A.weight", torch.ones(2, 3)), "no layer", "tower"),
    "no magnitudes": (lambda f: edit(f, use_dora=True), "missing", "lora_magnitude_vector"),
    "magnitudes": (put("base_model.model.head.lora_magnitude_vector", torch.ones(3)), "DoRA", "magnitude"),
    "a bias": (put("base_model.model.head.lora_B.bias", torch.ones(3)), "bias of the branch", "lora_B.bias"),
    "another base": (put("base_model.model.head.base_layer.weight", torch.ones(3, 7)), "base weight", "base_layer"),
    "another shape": (put(HEAD, torch.ones(2, 8)), "(2, 8)", HEAD),
    "another rank": (put(HEAD, torch.ones(3, 7)), "(3, 7)", HEAD),
    "NaN": (put(HEAD, torch.full((2, 7), torch.nan)), "NaN", HEAD),
    "Inf": (put(HEAD, torch.full((2, 7), torch.inf)), "Inf", HEAD),
    "integers": (put(HEAD, torch.ones(2, 7, dtype=torch.int32)), "int32", HEAD),
    "float8": (put(HEAD, torch.ones(2, 7).to(torch.float8_e4m3fn)), "float8", HEAD),
}


@pytest.mark.parametrize("damage, reason, place", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(damage: Callable[[Path], Any], reason: str, place: str, saved: Path) -> None:
    damage(saved)
    model = fresh(Linears)
    before, written = state(model), files(saved.parent)
    refused(lambda: load_adapter(model, saved), reason, place)
    assert_untouched(model, before)
    assert files(saved.parent) == written


def test_another_base_model(saved: Path, tmp_path: Path) -> None:
    wider = fresh(lambda: nn.ModuleDict({"lin": nn.Linear(6, 9), "head": nn.Linear(8, 3)}))
    refused(lambda: load_adapter(wider, saved), "(2, 7)", HEAD, remedy="base model")
    attention = fresh(Attention)
    refused(lambda: load_adapter(attention, saved), "matches no module", "target_modules", remedy="base model")
    save_adapter(adapted(Linears, [Rule(where="head", **TWO)]), tmp_path / "ours")
    refused(lambda: load_adapter(attention, tmp_path / "ours"), "'head.weight'", TENSORS, remedy="base model")
    refused(lambda: load_adapter(wider, tmp_path / "ours"), "(2, 7)", HEAD, remedy="base model")
    untied = fresh(Tied)
    untied.head.weight = nn.Parameter(untied.table.weight.detach().clone())
    save_adapter(adapted(Tied, [Rule(where="table", **TWO)], IDS), tmp_path / "tied")
    refused(lambda: load_adapter(untied, tmp_path / "tied"), "does not tie", TENSORS, remedy="tied")


def test_a_model_on_meta_takes_the_numbers_on_the_cpu(saved: Path) -> None:
    with torch.device("meta"):
        empty = Linears()
    real = load_adapter(fresh(Linears), saved)
    load_adapter(empty, saved)
    mine, theirs = (dict(m.named_parameters()) for m in (empty, real))
    factors = [name for name in theirs if "_lora_" in name]
    assert factors and all(torch.equal(mine[name], theirs[name]) for name in factors)
    assert all(mine[name].is_meta for name in theirs if name not in factors)


def test_peft_targets_that_do_nothing(tmp_path: Path) -> None:
    """A Linear that MultiheadAttention never calls, and a module under two names: PEFT adapts neither."""
    theirs = peft.get_peft_model(fresh(Attention), peft.LoraConfig(r=2, target_modules=["out_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    refused(lambda: load_adapter(fresh(Attention), tmp_path / "a"), "never calls", "target_modules", remedy="attention")
    theirs = peft.get_peft_model(fresh(Odd), peft.LoraConfig(r=2, target_modules=["named"]))
    theirs.save_pretrained(tmp_path / "b")
    refused(lambda: load_adapter(fresh(Odd), tmp_path / "b"), "only the first", "named", remedy="lora_fx.apply")


def test_settings_that_were_edited(tmp_path: Path) -> None:
    save_adapter(adapted(Linears, [Rule(where="head", **TWO)]), tmp_path / "a")
    edit(tmp_path / "a", lora_alpha=6)
    refused(lambda: load_adapter(fresh(Linears), tmp_path / "a"), "6", f"{CONFIG}, lora_alpha", remedy="both files")


@pytest.mark.parametrize("own", [False, True])
def test_flipped_bits_and_cut_files(own: bool, tmp_path: Path) -> None:
    """One flipped bit is refused, or is none that matters: the header of safetensors has padding and names of ours."""
    ours = adapted(Linears, [Rule(where="head", **TWO)])
    save_adapter(ours, tmp_path / "a", peft=not own)
    file = tmp_path / "a" / TENSORS
    good = file.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, data, 11), *range(data, len(good), 7)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        model = fresh(Linears)
        before = state(model)
        try:
            load_adapter(model, tmp_path / "a")
            assert at < data
        except LoraFxError:
            assert_untouched(model, before)
            continue
        head = [p for n, p in model.named_parameters() if "_lora_" in n]
        assert all(map(torch.equal, head, [p for n, p in ours.named_parameters() if "_lora_" in n]))
    for size in range(0, len(good), 29):
        file.write_bytes(good[:size])
        refused(lambda: load_adapter(fresh(Linears), tmp_path / "a"), "cannot be read", TENSORS, remedy="restore")


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with other files"])
@pytest.mark.parametrize("step", ["_write_file", "_sync_folder", "_exchange", "replace"])
def test_a_crash_leaves_the_old_adapter(
    step: str, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (adapted(Linears, [Rule(where="head", rank=rank)]) for rank in (1, 2))
    save_adapter(old, tmp_path / "a")
    if beside:
        (tmp_path / "a" / "notes.txt").write_text("mine")
    before = files(tmp_path)
    for n in range(1, 6):  # crash at the nth call
        with monkeypatch.context() as m:
            where = adapter_files.write_folder.__globals__ if step != "replace" else vars(os)
            calls, real = [], where[step]

            def crash(*args: Any, n: int = n, calls: list = calls, real: Any = real) -> Any:
                calls.append(args)
                if len(calls) == n:
                    raise KeyboardInterrupt
                return real(*args)

            m.setitem(where, step, crash)
            try:
                save_adapter(new, tmp_path / "a")
            except KeyboardInterrupt:
                assert files(tmp_path) == before or adapters(load_adapter(fresh(Linears), tmp_path / "a")).keys()
                assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
                assert_one_of(tmp_path / "a", old, new)
                continue
        assert_one_of(tmp_path / "a", new)
        save_adapter(old, tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").exists() == beside


def assert_one_of(folder: Path, *models: nn.Module) -> None:
    found = load_adapter(fresh(Linears), folder)
    ranks = [next(iter(adapters(m).values()))[2] for m in models]
    assert next(iter(adapters(found).values()))[2] in ranks


def test_refused_saves_write_nothing(tmp_path: Path) -> None:
    ours = adapted(Linears, [Rule(where="*", **TWO)])
    save_adapter(ours, tmp_path / "a")
    before = files(tmp_path)
    (tmp_path / "file").write_text("")
    refused(lambda: save_adapter(ours, tmp_path / "file"), "is a file", "file", remedy="folder")
    refused(lambda: save_adapter(ours, tmp_path / "file" / "a"), "cannot be written", "a", remedy="disk")
    with torch.no_grad():
        ours.head.weight_lora_default.B[0, 0] = torch.nan
    refused(lambda: save_adapter(ours, tmp_path / "a"), "NaN", "head.weight, B", remedy="checkpoint")
    (tmp_path / "file").unlink()
    assert files(tmp_path) == before


def test_saving_again_replaces(tmp_path: Path) -> None:
    first, second = (adapted(Linears, [Rule(where="head", rank=rank)]) for rank in (1, 2))
    for folder in tmp_path / "alone", tmp_path / "deep" / "er":
        save_adapter(first, folder)
        (folder / "notes.txt").write_text("mine")
        for model in second, second, first:
            save_adapter(model, folder)
            assert_same(model, load_adapter(fresh(Linears), folder))
        assert sorted(files(folder)) == [CONFIG, TENSORS, "notes.txt"]


def test_peft_writes_over_ours(tmp_path: Path) -> None:
    """PEFT replaces our header together with the tensors: what it trained is what is loaded."""
    ours = adapted(gpt2, CASES["query and value"].rules, {"input_ids": IDS})
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(fresh(gpt2), tmp_path / "a", is_trainable=True).eval()
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path / "a")
    assert lora_fx.verify(theirs, load_adapter(fresh(gpt2), tmp_path / "a", {"input_ids": IDS}), {"input_ids": IDS})
