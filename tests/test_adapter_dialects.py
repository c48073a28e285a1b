"""The table of dialects: the same adapter, spelled in each of them, comes to the same θ in the same places.

The layouts are made here by hand, as their libraries write them: kohya's sd-scripts, diffusers 0.42, loralib 0.1.2 and
PEFT 0.21. `Net` has the module names of an image model's attention.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import Rule, load_adapter, save_adapter
from lora_fx.errors import FileError
from lora_fx.export.adapters.dialects import DIALECTS, WRITTEN
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model.inventory import inventory
from tests import reference

P = "base_model.model."
Tensors = dict[str, torch.Tensor]
Q, OUT, CONV, FF = "mid_block.attn1.to_q", "mid_block.attn1.to_out.0", "conv_in", "ff.net_0.proj"
RANKS, ALPHAS = {Q: 2, OUT: 2, CONV: 3, FF: 2}, {Q: 4.0, OUT: 4.0, CONV: 4.5, FF: 4.0}
SCALES = {path: ALPHAS[path] / RANKS[path] for path in RANKS}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(6, 10), nn.ModuleList([nn.Linear(10, 5), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (self.to_q, *self.to_out):
            x = module(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(3, 6, 2)
        self.mid_block = nn.ModuleDict({"attn1": Attention()})
        self.ff = nn.ModuleDict({"net_0": nn.ModuleDict({"proj": nn.Linear(5, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid_block["attn1"](self.conv_in(x).transpose(1, 2))
        return self.ff["net_0"]["proj"](x)


def fresh(make: Callable[[], nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make().eval()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) / 2


X = numbers(2, 3, 7)
FACTORS = {
    path: (
        numbers(r, *fresh().get_submodule(path).weight.shape[1:]),
        numbers(len(fresh().get_submodule(path).weight), r),
    )
    for path, r in RANKS.items()
}


def pairs(spell: Callable[[str], tuple[str, str]]) -> Tensors:
    """Every A and B by the keys of a dialect."""
    found = {}
    for path, (A, B) in FACTORS.items():
        down, up = spell(path)
        found |= {down: A.clone(), up: B.reshape(*B.shape, *[1] * (A.ndim - 2)).clone()}
    return found


def named(before: str, a: str, b: str) -> Callable[[str], tuple[str, str]]:
    return lambda path: (f"{before}{path}.{a}", f"{before}{path}.{b}")


PEFTS = named(P, "lora_A.weight", "lora_B.weight")
CONFIGURED = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {CONV: 3}, "alpha_pattern": {CONV: 4.5},
    "target_modules": list(RANKS),
}  # fmt: skip


def folder(path: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(dict(tensors), path / TENSORS)
    (path / CONFIG).write_text(json.dumps({**CONFIGURED, **config}))
    return path


def expected() -> torch.Tensor:
    """W + s·B·A in the weights, in float64."""
    model = fresh().double()
    with torch.no_grad():
        for path, (A, B) in FACTORS.items():
            weight = model.get_submodule(path).weight
            delta = B.double() @ A.double().flatten(1)
            weight += SCALES[path] * delta.reshape(weight.shape)
        return model(X.double())


def theta(model: nn.Module) -> dict[str, tuple]:
    return {p.weight: (p.adapter.scale, p.adapter.rank, p.adapter.A, p.adapter.B) for p in inventory(model).places}


def assert_is(model: nn.Module) -> None:
    found = theta(model)
    assert {name.removesuffix(".weight") for name in found} == {*RANKS}
    for name, (scale, rank, A, B) in found.items():
        path = name.removesuffix(".weight")
        assert (scale, rank) == (SCALES[path], RANKS[path])
        assert torch.equal(A.flatten(), FACTORS[path][0].flatten()) and torch.equal(
            B.flatten(), FACTORS[path][1].flatten()
        )
    with torch.no_grad():
        assert torch.equal(model.double()(X.double()), expected()) or lora_fx.verify(model, dense(), X.double())


def dense() -> nn.Module:
    model = fresh().double()
    for path, (A, B) in FACTORS.items():
        weight = model.get_submodule(path).weight
        weight.data += SCALES[path] * (B.double() @ A.double().flatten(1)).reshape(weight.shape)
    return model


def with_alphas(tensors: Tensors, key: Callable[[str], str]) -> Tensors:
    return tensors | {key(path): torch.tensor(alpha) for path, alpha in ALPHAS.items()}


# ── PEFT's, spelled otherwise ────────────────────────────────────────────────────────────────────────────────────────

SPELLINGS = {
    "as PEFT does": PEFTS,
    "the adapter's name": named(P, "lora_A.default.weight", "lora_B.default.weight"),
    "another name": named(P, "lora_A.mine.weight", "lora_B.mine.weight"),
    "no prefix": named("", "lora_A.weight", "lora_B.weight"),
    "a doubled prefix": named(P + P, "lora_A.weight", "lora_B.weight"),
    "a compiled model": named(f"_orig_mod.{P}", "lora_A.weight", "lora_B.weight"),
    "compiled inside": named(f"{P}_orig_mod.", "lora_A.default.weight", "lora_B.default.weight"),
    "parallel": named(f"module.{P}", "lora_A.weight", "lora_B.weight"),
    "all of it": named(f"module._orig_mod.{P}{P}module.", "lora_A.x.weight", "lora_B.x.weight"),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_pefts_keys(spell, tmp_path):
    assert_is(load_adapter(fresh(), folder(tmp_path, pairs(spell)), X))


def test_a_state_dict_of_a_model_in_memory(tmp_path):
    """With all of the base in it, which is that of the model."""
    base = {f"{P}{name}": value for name, value in fresh().state_dict().items()}
    for path in RANKS:
        for name in ("weight", "bias"):
            base[f"{P}{path}.base_layer.{name}"] = base.pop(f"{P}{path}.{name}")
    tensors = {key: value.clone() for key, value in base.items()} | pairs(SPELLINGS["the adapter's name"])
    assert_is(load_adapter(fresh(), folder(tmp_path, tensors), X))
    tensors[f"{P}{Q}.base_layer.weight"] += 1
    with pytest.raises(FileError, match="the model's is another"):
        load_adapter(fresh(), folder(tmp_path, tensors), X)


def test_dora_in_memory(tmp_path):
    size = numbers(10).abs() + 1
    for key in ("lora_magnitude_vector", "lora_magnitude_vector.default", "lora_magnitude_vector.default.weight"):
        tensors = {
            f"{P}{Q}.lora_A.weight": FACTORS[Q][0],
            f"{P}{Q}.lora_B.weight": FACTORS[Q][1],
            f"{P}{Q}.{key}": size,
        }
        model = load_adapter(fresh(), folder(tmp_path, tensors, target_modules=[Q], use_dora=True), X)
        (place,) = inventory(model).places
        assert place.adapter.kind.name == "dora" and torch.equal(place.adapter.magnitude.flatten(), size)


# ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_of_a_folder_is_the_folder(tmp_path):
    assert_is(load_adapter(fresh(), folder(tmp_path, pairs(PEFTS)) / TENSORS, X))


@pytest.mark.parametrize("peft", [True, False])
def test_our_own_file_says_all_by_itself(peft, tmp_path):
    ours = load_adapter(fresh(), folder(tmp_path / "a", pairs(PEFTS)), X)
    save_adapter(ours, tmp_path / "b", peft=peft)
    shutil.copy(tmp_path / "b" / TENSORS, tmp_path / "one.safetensors")
    again = load_adapter(fresh(), tmp_path / "one.safetensors", X)
    assert reference.same_bits(reference.bits(again), reference.bits(ours))


def test_alpha_is_never_guessed(tmp_path):
    file = tmp_path / "one.safetensors"
    save_file(pairs(named("", "lora_A.weight", "lora_B.weight")), file)
    with pytest.raises(FileError, match=r"does not say its alpha[\s\S]*config="):
        load_adapter(fresh(), file, X)
    said = {"lora_alpha": 4, "alpha_pattern": {CONV: 4.5}}
    assert_is(load_adapter(fresh(), file, X, config=said))
    model = load_adapter(fresh(), file, X, config={"lora_alpha": 3, "use_rslora": True})
    assert {a.scale for a in inventory(model).adapters} == {3 / 2**0.5, 3 / 3**0.5}
    save_file(with_alphas(load_file(file), lambda path: f"{path}.alpha"), file)
    assert_is(load_adapter(fresh(), file, X))
    for config, reason in ((dict(lora_alpha=1), "in the config too"), (dict(what=1), "does not know what this option")):
        with pytest.raises(FileError, match=reason):
            load_adapter(fresh(), file, X, config=config)
    with pytest.raises(FileError, match="say themselves"):
        load_adapter(fresh(), folder(tmp_path / "a", pairs(PEFTS)), X, config={"lora_alpha": 1})


# ── pickles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_pickle(path: Path, **config: Any) -> Path:
    at = folder(path, {}, **config)
    (at / TENSORS).unlink()
    torch.save(pairs(PEFTS), at / "adapter_model.bin")
    return at


def test_a_pickle_of_tensors(tmp_path):
    at = as_pickle(tmp_path / "a")
    assert_is(load_adapter(fresh(), at, X))
    torch.save({"state_dict": pairs(PEFTS)}, at / "adapter_model.bin")
    assert_is(load_adapter(fresh(), at, X))


class Code:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def rezipped(file: Path, how: int, change: Callable[[bytes], bytes] = lambda data: data) -> None:
    """The same entries, packed otherwise."""
    with zipfile.ZipFile(file) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(file, "w", how) as new:
        for name, data in entries.items():
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def write_code(file: Path) -> None:
    torch.save({f"{P}{Q}.lora_A.weight": Code(file.parent / "ran")}, file)


def write_view(file: Path) -> None:
    torch.save({f"{P}{Q}.lora_A.weight": torch.ones(1).expand(2**40)}, file)


def write_flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(FACTORS[Q][0].numpy().tobytes())] ^= 1
    file.write_bytes(data)


PICKLED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (write_code, "cannot be read"),
    "a view of terabytes": (write_view, "one after the other"),
    "a list": (lambda file: torch.save([1], file), "holds a list"),
    "a number": (lambda file: torch.save({"a": 1}, file), "is a int"),
    "a flipped bit": (write_flipped, "is damaged"),
    "compressed": (lambda file: rezipped(file, zipfile.ZIP_DEFLATED), "compressed"),
    "more numbers than there are": (
        lambda file: rezipped(file, zipfile.ZIP_STORED, lambda data: data.replace(b"K\x0c", b"M\x00\xff")),
        "cannot be read",
    ),
    "before 1.6": (lambda f: torch.save(pairs(PEFTS), f, _use_new_zipfile_serialization=False), "since torch 1.6"),
    "NaN": (lambda file: torch.save({f"{P}{Q}.lora_A.weight": torch.full((2, 6), torch.nan)}, file), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "reason"), PICKLED.values(), ids=PICKLED)
def test_pickles_that_are_refused(write, reason, tmp_path):
    at = as_pickle(tmp_path / "a")
    write(at / "adapter_model.bin")
    with pytest.raises(FileError, match=reason):
        load_adapter(fresh(), at, X)
    assert not (at / "ran").exists()


def test_the_code_would_have_run(tmp_path):
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps(Code(tmp_path)))


# ── kohya and diffusers ──────────────────────────────────────────────────────────────────────────────────────────────


def kohya(path: str) -> tuple[str, str]:
    name = f"lora_unet_{path.replace('.', '_')}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def kohyas() -> Tensors:
    return with_alphas(pairs(kohya), lambda path: f"lora_unet_{path.replace('.', '_')}.alpha")


def processor(path: str) -> tuple[str, str]:
    before, _, last = path.removesuffix(".0").rpartition(".")
    name = f"unet.{before}.processor.{last}_lora" if last in ("to_q", "to_out") else f"unet.{path}.lora"
    return f"{name}.down.weight", f"{name}.up.weight"


#: diffusers' files without alphas have the scale 1: those of the table say them in keys, which it reads too
DIFFUSED = {
    "diffusers": named("unet.", "lora_A.weight", "lora_B.weight"),
    "before PEFT": named("unet.", "lora.down.weight", "lora.up.weight"),
    "a text encoder's": named("unet.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "processors": processor,
}


def test_kohyas_file(tmp_path):
    save_file(kohyas(), tmp_path / "a.safetensors")
    assert_is(load_adapter(fresh(), tmp_path / "a.safetensors", X))
    torch.save(kohyas(), tmp_path / "a.pt")
    assert_is(load_adapter(fresh(), tmp_path / "a.pt", X))
    save_file(pairs(kohya), tmp_path / "a.safetensors")
    model = load_adapter(fresh(), tmp_path / "a.safetensors", X)
    assert {a.scale for a in inventory(model).adapters} == {1.0}


@pytest.mark.parametrize("spell", DIFFUSED.values(), ids=DIFFUSED)
def test_diffusers_files(spell, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(with_alphas(pairs(spell), lambda path: f"unet.{path}.alpha"), file)
    assert_is(load_adapter(fresh(), tmp_path, X))
    save_file(pairs(spell), file)
    assert {a.scale for a in inventory(load_adapter(fresh(), file, X)).adapters} == {1.0}
    assert_is(
        load_adapter(
            nn.ModuleDict({"unet": fresh()})["unet"], file, X, config=dict(lora_alpha=4, alpha_pattern={CONV: 4.5})
        )
    )


def test_metadata_of_diffusers(tmp_path):
    table = {f"unet.{key}": value for key, value in CONFIGURED.items() if key != "peft_type"}
    said = {"format": "pt", "lora_adapter_metadata": json.dumps(table)}
    save_file(pairs(DIFFUSED["diffusers"]), tmp_path / "a.safetensors", said)
    assert_is(load_adapter(fresh(), tmp_path / "a.safetensors", X))
    for broken in ("{", json.dumps({"unet.r": "2"}), "[1]"):
        save_file(pairs(DIFFUSED["diffusers"]), tmp_path / "a.safetensors", {"lora_adapter_metadata": broken})
        with pytest.raises(FileError, match="lora_adapter_metadata"):
            load_adapter(fresh(), tmp_path / "a.safetensors", X)


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("baked", [False, True])
def test_a_file_of_several_alphas_says_who_misreads_it(dialect, baked, tmp_path):
    """diffusers 0.42 takes the most frequent alpha for attention's projections; by hand: off by 0.22, baked by 2e-7."""
    rules = [Rule(where="*to_q", rank=2, alpha=3), Rule(where="*to_out.0", rank=1, alpha=4)]
    model = lora_fx.apply(fresh(), rules, X)
    reference.fill(model)
    wrong = dialect == "kohya" and not baked
    with pytest.warns(UserWarning, match="has 2 alphas.*bake_scales=True") if wrong else contextlib.nullcontext():
        save_adapter(model, tmp_path / "a.safetensors", dialect=dialect, part="unet", bake_scales=baked)
    assert lora_fx.verify(load_adapter(fresh(), tmp_path / "a.safetensors", X), model, X)
    if baked and dialect == "kohya":
        written = load_file(tmp_path / "a.safetensors")
        assert {float(t) for key, t in written.items() if key.endswith("alpha")} == {2.0}


@pytest.mark.filterwarnings("ignore:.*diffusers reads the projections:UserWarning")
@pytest.mark.parametrize("dialect", WRITTEN)
def test_what_we_write_comes_back(dialect, tmp_path):
    ours = load_adapter(fresh(), folder(tmp_path / "a", pairs(PEFTS)), X)
    save_adapter(ours, tmp_path / "b.safetensors", dialect=dialect, part="unet")
    assert_is(load_adapter(fresh(), tmp_path / "b.safetensors", X))
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == (kohyas() if dialect == "kohya" else pairs(DIFFUSED["diffusers"])).keys()
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim" if dialect == "kohya" else "lora_adapter_metadata"]
    root_scaled = lora_fx.apply(fresh(), Rule(where="*to_q", rank=2, alpha=3, scaling="rslora"), X)
    reference.fill(root_scaled)
    save_adapter(root_scaled, tmp_path / "c.safetensors", dialect=dialect, part="unet")
    again = load_adapter(fresh(), tmp_path / "c.safetensors", X)
    assert lora_fx.verify(again, root_scaled, X) and not lora_fx.verify(fresh(), root_scaled, X)
    assert {f.name for f in tmp_path.iterdir()} == {"a", "b.safetensors", "c.safetensors"}


@pytest.mark.parametrize(
    ("rules", "options", "reason"),
    [
        ([Rule(where="*to_q", kind="dora", rank=2)], dict(dialect="kohya", part="unet"), "no word for use_dora"),
        ([Rule(where="*to_q", rank=2), Rule(where="ff*", kind="full")], dict(dialect="kohya", part="unet"), "_to_save"),
        ([Rule(where="*to_q", rank=2)], dict(dialect="kohya"), "which part"),
        ([Rule(where="*to_q", rank=2)], dict(dialect="kohya", part="vae"), "'vae' is none of"),
        ([Rule(where="*to_q", rank=2)], dict(dialect="lycoris"), "none that is written"),
        ([Rule(where="*to_q", rank=2)], dict(part="unet"), "is for one model"),
    ],
)  # fmt: skip
def test_what_a_dialect_cannot_say(rules, options, reason, tmp_path):
    model = lora_fx.apply(fresh(), rules, X)
    with pytest.raises(FileError, match=reason):
        save_adapter(model, tmp_path / "a.safetensors", **options)
    with pytest.raises(FileError, match=r"end in \.safetensors"):
        save_adapter(model, tmp_path / "a.bin", dialect="kohya", part="unet")
    assert not list(tmp_path.iterdir())


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = Net(), Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unet(x) + self.text_encoder(x)


def test_a_file_for_several_models(tmp_path):
    other = {key.replace("lora_unet_", "lora_te_"): 2 * t if t.ndim else t for key, t in kohyas().items()}
    save_file(kohyas() | other, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"for several models: text_encoder, unet[\s\S]*part='text_encoder'"):
        load_adapter(fresh(), tmp_path / "a.safetensors", X)
    assert_is(load_adapter(fresh(), tmp_path / "a.safetensors", X, part="unet"))
    twice = load_adapter(fresh(), tmp_path / "a.safetensors", X, part="text_encoder")
    assert torch.equal(theta(twice)[f"{Q}.weight"][2], 2 * FACTORS[Q][0])
    with pytest.raises(FileError, match="nothing for the part 'vae'"):
        load_adapter(fresh(), tmp_path / "a.safetensors", X, part="vae")
    whole = load_adapter(fresh(Pipeline), tmp_path / "a.safetensors", X, part="unet")
    assert {place.weight for place in inventory(whole).places} == {f"unet.{path}.weight" for path in RANKS}


# ── loralib ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.last = nn.Embedding(11, 6), nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.qkv(self.table(ids)).tanh())


IDS = torch.tensor([[1, 2, 10], [4, 0, 5]])
LORALIB = {
    "table.lora_A": numbers(2, 11), "table.lora_B": numbers(6, 2), "last.lora_A": numbers(2, 12),
    "last.lora_B": numbers(5, 2), "qkv.lora_A": numbers(4, 6), "qkv.lora_B": numbers(8, 2), "last.bias": numbers(5),
}  # fmt: skip
SAID = {"lora_alpha": 3, "enable_lora": [True, False, True]}


def test_loralibs_state_dict(tmp_path):
    """The groups of a fused layer that are enabled have a product each: here query and value."""
    torch.save(LORALIB, tmp_path / "a.pt")
    model = load_adapter(fresh(Fused), tmp_path / "a.pt", IDS, config=SAID)
    base = fresh(Fused)
    with torch.no_grad():
        own = LORALIB
        base.table.weight += 1.5 * (own["table.lora_B"] @ own["table.lora_A"]).T
        base.last.weight += 1.5 * own["last.lora_B"] @ own["last.lora_A"]
        base.qkv.weight[:4] += 1.5 * own["qkv.lora_B"][:4] @ own["qkv.lora_A"][:2]
        base.qkv.weight[8:] += 1.5 * own["qkv.lora_B"][4:] @ own["qkv.lora_A"][2:]
        base.last.bias.copy_(own["last.bias"])
    assert lora_fx.verify(model, base, IDS) and not lora_fx.verify(fresh(Fused), base, IDS)
    save_adapter(model, tmp_path / "b")
    assert lora_fx.verify(load_adapter(fresh(Fused), tmp_path / "b", IDS), base, IDS)
    among = {name: value for name, value in fresh(Fused).state_dict().items() if name != "last.bias"} | LORALIB
    torch.save(among, tmp_path / "a.pt")
    assert lora_fx.verify(
        load_adapter(fresh(Fused), tmp_path / "a.pt", IDS, config={**SAID, "bias": "lora_only"}), base, IDS
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "do not say their alpha"), ({"lora_alpha": 3}, "2 of 3 groups"),
        ({**SAID, "enable_lora": [True, True, True]}, "2 of 3 groups"), ({**SAID, "enable_lora": 7}, "2 of 3 groups"),
        ({**SAID, "use_rslora": True}, "none of loralib's"), ({"lora_alpha": "3"}, "finite number"),
    ],
)  # fmt: skip
def test_what_loralibs_file_does_not_say(config, reason, tmp_path):
    torch.save(LORALIB, tmp_path / "a.pt")
    with pytest.raises(FileError, match=reason):
        load_adapter(fresh(Fused), tmp_path / "a.pt", IDS, config=config)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def changed(tensors: Tensors, drop: str = "", **more: torch.Tensor) -> Tensors:
    return {key: t for key, t in tensors.items() if key != drop} | more


OF_Q = "lora_unet_mid_block_attn1_to_q"
A_OF_Q = f"{OF_Q}.lora_down.weight"
DIFFUSERS = pairs(DIFFUSED["diffusers"])
BAD: dict[str, tuple[Tensors, str, str]] = {
    "another model": (
        {k.replace("mid_block", "middle"): t for k, t in kohyas().items()}, "no module", "mid_block_attn1_to_",
    ),
    "no B": (changed(kohyas(), drop=kohya(Q)[1]), "its factor B is missing", ""),
    "another rank": (changed(kohyas(), **{A_OF_Q: numbers(5, 6)}), "its shape is", ""),
    "no matrix": (changed(kohyas(), **{kohya(Q)[1]: numbers(7)}), "its shape is", ""),
    "an alpha of two": (changed(kohyas(), **{f"{OF_Q}.alpha": numbers(2)}), "alpha is one number", ""),
    "a foreign key": (changed(kohyas(), foreign=numbers(2)), "begins with none of", ""),
    "LoHa": (changed(kohyas(), **{f"{OF_Q}.hada_w1_a": numbers(2, 2)}), "LoHa", ""),
    "DoRA of kohya's": (changed(kohyas(), **{f"{OF_Q}.dora_scale": numbers(10)}), "DoRA over axes", ""),
    "NaN": (changed(kohyas(), **{A_OF_Q: numbers(2, 6) / 0 * 0}), "NaN", ""),
    "another of diffusers": (
        {k.replace("mid_block", "mid_blocks"): t for k, t in DIFFUSERS.items()}, "no module", "mid_block.attn1",
    ),
    "no word of diffusers": (changed(DIFFUSERS, **{f"unet.{Q}.lokr_w1": numbers(2)}), "none of diffusers'", ""),
    "two entries": (
        pairs(DIFFUSED["diffusers"]) | pairs(DIFFUSED["before PEFT"]), "two entries for one weight", "leave one",
    ),
    "nothing": ({}, "of no dialect", "kohya"), "a base": ({"conv_in.weight": numbers(2)}, "of no dialect", "loralib"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "reason", "remedy"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(tensors, reason, remedy, tmp_path):
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    model = fresh()
    before = reference.bits(model)
    with pytest.raises(FileError) as caught:
        load_adapter(model, tmp_path / "a.safetensors", X)
    assert reason in caught.value.reason and remedy in caught.value.remedy, caught.value
    assert reference.same_bits(reference.bits(model), before)


def test_two_entries_for_one_weight(tmp_path):
    tensors = pairs(PEFTS) | {f"{P}{Q}.lora_A.default.weight": FACTORS[Q][0].clone()}
    with pytest.raises(FileError, match="are two entries for one weight"):
        load_adapter(fresh(), folder(tmp_path, tensors), X)
    tensors = pairs(named(P, "lora_A.a.weight", "lora_B.b.weight"))
    with pytest.raises(FileError, match="it holds the adapters a, b"):
        load_adapter(fresh(), folder(tmp_path, tensors), X)


def test_names_that_differ_in_dots_alone(tmp_path):
    both = nn.Sequential()
    both.add_module("a_b", nn.Linear(3, 3))
    both.add_module("a", nn.Sequential())
    both.a.add_module("b", nn.Linear(3, 3))
    save_file(
        {"lora_unet_a_b.lora_down.weight": numbers(1, 3), "lora_unet_a_b.lora_up.weight": numbers(3, 1)},
        tmp_path / "a.pt.safetensors",
    )
    with pytest.raises(FileError, match=r"a_b or a\.b|a\.b or a_b"):
        load_adapter(both, tmp_path / "a.pt.safetensors", numbers(2, 3))
    model = lora_fx.apply(both, Rule(where="*", rank=1), numbers(2, 3))
    with pytest.raises(FileError, match="another module is called"):
        save_adapter(model, tmp_path / "b.safetensors", dialect="kohya", part="unet")


def test_the_table_prints_what_it_knows():
    assert [row.name for row in DIALECTS[:3]] == ["lora_fx", "AdaLoRA", "peft"]
    assert len({row.name for row in DIALECTS}) == len(DIALECTS) and all(row.keys for row in DIALECTS)
