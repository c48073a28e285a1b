"""Adapter files: PEFT reads what we save, we read what PEFT saves, and every damaged file is refused."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import Adapter, Rule, wiring
from lora_fx.errors import FileError, LoraFxError
from lora_fx.export import adapter_files
from lora_fx.export.adapter_files import CONFIG, TENSORS, load_adapter, save_adapter

peft = pytest.importorskip("peft")
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's
torch.set_num_threads(1)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Linears(nn.Module):
    """`lin` is also how the path of `block.lin` ends."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.block, self.head = nn.Linear(6, 9), nn.ModuleDict({"lin": nn.Linear(9, 7)}), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block["lin"](self.lin(x).relu()).relu())


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


def gpt2() -> nn.Module:
    size = dict(n_embd=12, n_layer=2, n_head=2, vocab_size=17, n_positions=9)
    return GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def mixtral() -> nn.Module:
    size = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return MixtralForCausalLM(MixtralConfig(**size, vocab_size=17, num_local_experts=3, num_experts_per_tok=2))


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
        f"{path}.{child}": (a.A, a.B, a.rank, a.alpha, a.scaling, a.dropout.p, a.rows, a.name, a.role, a.layout)
        for path, _, child, a in wiring.find_adapters(model)
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
    "linear": Case(Linears, numbers(4, 6), [Rule(where="*", dropout=0.25, **TWO)], dict(target_modules=["lin", "head"])),
    "patterns": Case(
        Linears,
        numbers(4, 6),
        [Rule(where="lin", rank=3, alpha=1.7), Rule(where="block.lin", rank=1, alpha=2), Rule(where="head", **TWO)],
        dict(target_modules=r".*lin|head", rank_pattern={"^lin": 3, r"block\.lin": 1}, alpha_pattern={"lin": 5}),
    ),
    "one of two": Case(Linears, numbers(4, 6), [Rule(where="lin", **TWO)], dict(target_modules="block.lin")),
    "rslora": Case(
        Linears, numbers(4, 6), [Rule(where="*", scaling="rslora", **TWO)], dict(target_modules="all-linear", use_rslora=True)
    ),
    "two scalings": Case(
        Linears, numbers(4, 6), [Rule(where="head", scaling="rslora", **TWO), Rule(where="*", rank=3)],
        dict(target_modules=["lin"], exclude_modules=["block.lin"]),
    ),
    "text": Case(Text, IDS, [Rule(where="table", rank=3), Rule(where="*", **TWO)], dict(target_modules=["table", "mix", "out"])),
    "conv": Case(
        Convs, numbers(2, 3, 8), [Rule(where="*", **TWO)], dict(target_modules=["one", "two", "three"], lora_dropout=0.1)
    ),
    "attention": Case(
        Attention, numbers(2, 4, 12), [Rule(where="attention.in_proj*", rank=4), Rule(where="*", **TWO)],
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
    "one of tied": Case(Tied, IDS, [Rule(where="mix", **TWO), Rule(op="embedding", **TWO)], dict(target_modules=["head"])),
    "gpt2": Case(
        gpt2, {"input_ids": IDS}, [Rule(where="*c_attn", rank=3, alpha=4, layers="1"), Rule(where="*", **TWO)],
        dict(target_modules=["c_attn", "c_fc", "wte"], layers_to_transform=[1], layers_pattern="h"),
    ),
    "query and value": Case(gpt2, {"input_ids": IDS}, [Rule(role="attention.query | attention.value", rank=3, alpha=4)]),
    "two scales": Case(
        gpt2, {"input_ids": IDS}, [Rule(role="attention.query", rank=1, alpha=3), Rule(role="attention.value", rank=2, alpha=3)]
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
    again = load_adapter(fresh(case.make), tmp_path / "a", case.x)
    assert_same(ours, again)
    assert lora_fx.verify(ours, again, case.x).error == 0


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.config], ids=[n for n, c in CASES.items() if c.config])
def test_we_read_what_peft_saves(case: Case, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(fresh(case.make), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **case.config})).eval()
    fill(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(fresh(case.make), tmp_path / "a", case.x)
    assert lora_fx.verify(theirs, ours, case.x)
    assert not lora_fx.verify(theirs, fresh(case.make), case.x)
