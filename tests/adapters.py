"""What the tests of adapter files share: models, adapted ones, and what a refusal must leave as it was."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
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
from lora_fx import Adapter
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model.inventory import inventory
from tests import reference


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


class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.experts = nn.Parameter(torch.randn(7, 6) / 3), nn.Parameter(torch.randn(3, 6, 5) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm((x @ self.w).expand(3, -1, -1), self.experts)


class Outside(nn.Module):
    """The weight of `read` is multiplied with here."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(F.linear(x, self.read.weight, self.read.bias).tanh())


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


def gpt2(layers: int = 2) -> nn.Module:
    size = dict(n_embd=12, n_layer=layers, n_head=2, vocab_size=17, n_positions=9)
    return GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def mixtral() -> nn.Module:
    size = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = MixtralConfig(**size, vocab_size=17, num_local_experts=3, num_experts_per_tok=2)
    return MixtralForCausalLM._from_config(config, experts_implementation="eager")  # grouped_mm has no float64


def fresh(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Frozen: some kernels choose another path for trainable weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False).to(dtype)


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


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """θ, settings and outputs, to the bit."""
    assert reference.same_bits(reference.bits(a), reference.bits(b))
    for one, two in zip(inventory(a).places, inventory(b).places, strict=True):
        assert (one.path, one.attribute, one.part) == (two.path, two.attribute, two.part)
        left, right = one.adapter, two.adapter
        assert (left.kind, settings(left), left.layout) == (right.kind, settings(right), right.layout)
        assert (left.name, left.rows, left.role, left.dropout.p) == (
            right.name,
            right.rows,
            right.role,
            right.dropout.p,
        )


def settings(adapter: lora_fx.Adapter) -> dict[str, Any]:
    """With the number for an alpha that is the rank by default."""
    return {**adapter.settings, **({"alpha": adapter.alpha} if "alpha" in adapter.settings else {})}


def whole(model: nn.Module) -> dict[str, Any]:
    """What a refused call must leave as it was."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"bits": reference.bits(model), "classes": reference.classes(model), "trains": trains}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = whole(model)
    assert reference.same_bits(after["bits"], before["bits"])
    assert (after["classes"], after["trains"]) == (before["classes"], before["trains"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TWO = dict(rank=2, alpha=3)


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


def saved_by_peft(folder: Path) -> Path:
    """An adapter of `Linears` that PEFT has written."""
    theirs = peft.get_peft_model(fresh(Linears), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lin", "head"]))
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(folder)
    return folder


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


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None) -> None:
    """Change the tensors, or nothing, and write them as PEFT would, without our header."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def inner(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make())
