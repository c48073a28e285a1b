"""Section 7 of the LoRA paper on one's own model: planted subspaces, closed forms, random matrices, files, figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.cli import main
from lora_fx.errors import AdapterError, FileError
from lora_fx.paper.amplification import amplification
from lora_fx.paper.base import with_base
from lora_fx.paper.factors import Directions, Factors, read_adapter
from lora_fx.paper.subspaces import expected_phi, overlaps, phi, random_directions
from tests.zoo import case

EPS = torch.finfo(torch.float64).eps
PNG = b"\x89PNG\r\n\x1a\n"


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(d: int, n: int, seed: int) -> torch.Tensor:
    return random_directions(d, n, seed)


def factors(A: torch.Tensor, B: torch.Tensor, scale: float | None = 1.0, W: torch.Tensor | None = None) -> Factors:
    return Factors("w", A, B, scale, W)


# ── φ ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("of", ["A", "B", "in", "out"])
def test_adapters_that_share_a_planted_subspace_show_exactly_that(of):
    """r₁ = 5 and r₂ = 9 directions, of which the 3 largest span one space: φ(i, j) = min(i, j, 3) / min(i, j)."""
    d, k, n, m = 40, 3, 5, 9
    basis, mixed = orthonormal(d, n + m - k, 1), orthonormal(k, k, 2)
    first, second = basis[:, :n], torch.cat([basis[:, :k] @ mixed, basis[:, n:]], 1)
    pair = []
    for seed, U in enumerate((first, second)):
        r = U.shape[1]
        values = torch.cat([torch.full((k,), 8.0), torch.linspace(2, 1, r - k)]).double()
        spanned, other = orthonormal(r, r, 10 + seed) * values @ U.mT, orthonormal(d, r, 20 + seed)
        if of in ("A", "in"):
            pair.append(factors(spanned, other))
        else:
            pair.append(factors(other.mT, spanned.mT))
    if of in ("in", "out"):  # the other factor is orthonormal, so that B·A has the singular values of this one
        assert all(len(f.delta.S) == f.rank for f in pair)
    found = phi(pair[0].directions(of), pair[1].directions(of))
    i, j = torch.arange(1, n + 1)[:, None], torch.arange(1, m + 1)[None, :]
    smaller = torch.minimum(i, j)
    planted = smaller.clamp(max=k).double() / smaller
    inside = (i >= k) & (j >= k) | (i < k) & (j >= k) | (i >= k) & (j < k)  # within the 3 equal ones any basis will do
    assert bool(((found - planted).abs() <= 8 * d * EPS)[inside].all())  # 8: the largest value over the smallest gap


def test_random_gaussians_match_their_expectation():
    """The mean of φ(i, j) over independent subspaces is max(i, j) / d, within five standard errors of each mean."""
    d, n, m, draws = 24, 4, 7, 300
    drawn = torch.stack([phi(orthonormal(d, n, 2 * s), orthonormal(d, m, 2 * s + 1)) for s in range(draws)])
    error = drawn.std(0) / draws**0.5
    expected = expected_phi(n, m, d)
    assert bool(((drawn.mean(0) - expected).abs() <= 5 * error).all())
    assert float(expected[0, 0]) == 1 / d and float(expected[3, 6]) == 7 / d


def test_phi_of_an_adapter_with_itself_is_one_and_lies_between():
    A = gaussian(6, 30)
    U = factors(A, gaussian(20, 6, seed=1)).directions("A")
    found = phi(U, U)
    assert bool(((found - 1).abs() <= 30 * EPS).all())
    other = phi(U, orthonormal(30, 9, 3))
    assert other.shape == (6, 9) and bool((other >= 0).all()) and bool((other <= 1).all())


def test_directions_are_those_of_a_dense_decomposition():
    """QR of the factors against the SVD of s·B·A: values by Weyl's bound, spans by Wedin's, both in float64."""
    A, B, s = gaussian(5, 33), gaussian(47, 5, seed=1), 0.25
    own = factors(A, B, s).delta
    U, S, Vh = torch.linalg.svd(s * B @ A, full_matrices=False)
    rounding = 47 * EPS * float(S[0])
    assert len(own.S) == 5 and bool(((own.S - S[:5]).abs() <= rounding).all())
    for mine, dense in ((own.U, U[:, :5]), (own.V, Vh[:5].mT)):
        for k in range(1, 6):
            gap = float(S[k - 1] - S[k])
            difference = mine[:, :k] @ mine[:, :k].mT - dense[:, :k] @ dense[:, :k].mT
            assert float(torch.linalg.matrix_norm(difference, 2)) <= 4 * rounding / gap
    rebuilt = own.U * own.S @ own.V.mT - s * B @ A
    assert float(torch.linalg.matrix_norm(rebuilt, 2)) <= rounding


def test_no_product_of_a_weights_size_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in made)])
            return out

    A, B = gaussian(4, 300), gaussian(200, 4, seed=1)
    with Largest() as seen:
        own = factors(A, B)
        for of in ("A", "B", "in", "out"):
            own.directions(of)
        assert own.delta.effective_rank > 1
    assert 0 < seen.numel <= 4 * 300


def test_directions_that_are_rounding_do_not_count():
    A = torch.cat([gaussian(3, 20), torch.zeros(5, 20).double()])
    own = factors(A, gaussian(30, 8, seed=1))
    assert own.directions("A").shape == (20, 3) and own.directions("B").shape == (30, 8) and len(own.delta.S) == 3


def test_energy_and_effective_rank_are_those_of_their_definitions():
    U, V = orthonormal(12, 4, 1), orthonormal(10, 4, 2)
    equal = Directions.of(U, V.mT)
    assert abs(equal.effective_rank - 4) <= 4 * 12 * EPS  # n equal values: exp(log n)
    assert bool(((equal.energy - torch.tensor([0.25, 0.5, 0.75, 1]).double()).abs() <= 12 * EPS).all())
    one = Directions.of(U[:, :1], V[:, :1].mT)
    assert abs(one.effective_rank - 1) <= 12 * EPS


# ── table 7 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_amplification_of_a_constructed_pair_is_the_closed_form():
    """W = Σ wₖ·uₖ·vₖᵀ and δ = s·Σ dⱼ·uⱼ·vⱼᵀ over two of its directions: ‖UᵀWV‖² = Σ wⱼ²."""
    U, V = orthonormal(18, 6, 1), orthonormal(14, 6, 2)
    w = torch.tensor([9.0, 5.0, 3.0, 2.0, 0.5, 0.25]).double()
    chosen, d, s = [3, 4], torch.tensor([7.0, 4.0]).double(), 0.5
    own = factors(V[:, chosen].mT, U[:, chosen] * d, s, U * w @ V.mT)
    found = amplification(own)
    norm = s * float((49 + 16) ** 0.5)
    along = float((w[3] ** 2 + w[4] ** 2).sqrt())
    rounding = 18 * EPS * float(w[0])
    assert found.rank == 2 and abs(found.norm_delta - norm) <= rounding
    assert abs(found.along_delta - along) <= rounding and abs(found.factor - norm / along) <= rounding * norm / along**2
    assert abs(found.along_w - (81 + 25) ** 0.5) <= rounding and abs(found.norm_w - float(w.norm())) <= rounding
    first = amplification(own, rank=1)
    assert abs(first.along_delta - 2.0) <= rounding and abs(first.along_w - 9.0) <= rounding
    assert abs(found.energy[0] - 49 / 65) <= rounding


def test_random_directions_see_their_share_of_a_weight():
    """E‖UᵀWV‖² = r²·‖W‖² / (out·in), within five standard errors."""
    W = gaussian(20, 16, seed=5)
    own = factors(gaussian(3, 16), gaussian(20, 3, seed=1), 1.0, W)
    drawn = torch.tensor([amplification(own, seed=s).along_random ** 2 for s in range(200)])
    expected = 9 * float(W.square().sum()) / (20 * 16)
    assert abs(float(drawn.mean()) - expected) <= 5 * float(drawn.std()) / 200**0.5


# ── where adapters come from ─────────────────────────────────────────────────────────────────────────────────────────


def adapted(seed: int, rank: int = 3) -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    torch.manual_seed(seed)
    lora_fx.apply(model, Rule(where="*", rank=rank, alpha=2 * rank), torch.randn(4, 12))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    return model


def test_a_model_its_folders_and_its_file_have_the_same_factors(tmp_path):
    model = adapted(0)
    own = read_adapter(model)
    lora_fx.save_adapter(model, tmp_path / "peft")
    lora_fx.save_adapter(model, tmp_path / "own", peft=False)
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "tensors.safetensors"
    bare.write_bytes((tmp_path / "peft" / "adapter_model.safetensors").read_bytes())
    file = tmp_path / "peft" / "adapter_model.safetensors"
    for source in (tmp_path / "peft", tmp_path / "own", file, bare):
        found = read_adapter(source)
        assert list(found) == list(own) == ["0.weight", "2.weight"]
        for name, factors_ in found.items():
            assert torch.equal(factors_.A, own[name].A) and torch.equal(factors_.B, own[name].B)
            assert factors_.scale == (None if source == bare else 2.0)
    assert torch.equal(own["0.weight"].weight, model[0].weight.double())


def test_parts_of_a_fused_weight_are_adapters_of_their_own_in_every_file(tmp_path):
    model, inputs = case("gpt2").build()
    lora_fx.apply(model, [Rule(role="attention.query", rank=2), Rule(role="attention.value", rank=2)], inputs)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    own = read_adapter(model)
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters() if "_lora_" not in n}
    save_file(weights, tmp_path / "base.safetensors")
    assert any(name.endswith("c_attn.weight[value]") for name in own), list(own)
    for peft in (True, False):
        lora_fx.save_adapter(model, tmp_path / str(peft), peft=peft)
        found = with_base(read_adapter(tmp_path / str(peft)), tmp_path / "base.safetensors")
        assert found.keys() == own.keys()
        for name, one in own.items():
            assert torch.equal(found[name].weight, one.weight) and torch.equal(found[name].A, one.A)
            assert torch.equal(found[name].scale * found[name].B, one.scale * one.B)


def test_base_weights_are_found_and_turned(tmp_path):
    model = adapted(0)
    own = read_adapter(model)
    lora_fx.save_adapter(model, tmp_path / "adapter")
    save_file({"0.weight": model[0].weight.detach()}, tmp_path / "1.safetensors")
    save_file({"model.2.weight": model[2].weight.detach().T.contiguous()}, tmp_path / "2.safetensors")
    found = with_base(read_adapter(tmp_path / "adapter"), tmp_path)
    assert all(torch.equal(found[name].weight, own[name].weight) for name in own)
    assert amplification(found["2.weight"]) == amplification(own["2.weight"])


def test_experts_and_parts_are_adapters_of_their_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x):
            return torch.einsum("ebi,eoi->ebo", x, self.weight)

    torch.manual_seed(0)
    model = lora_fx.apply(Experts(), Rule(where="*", rank=2), torch.randn(3, 4, 6))
    nn.init.normal_(model.get_parameter("weight_lora_default.B"))
    found = read_adapter(model)
    assert list(found) == ["weight[0]", "weight[1]", "weight[2]"]
    assert found["weight[1]"].shape == (8, 6) and torch.equal(found["weight[1]"].weight, model.weight[1].double())


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = gaussian(3, 12), gaussian(20, 3)
    one = {"w": factors(a, b)}
    with pytest.raises(LoraFxError, match="the weight is 20×12 for one, 20×10 for the other"):
        overlaps(one, {"w": factors(gaussian(3, 10), b)})
    with pytest.raises(LoraFxError, match="second adapter does not adapt w; it adapts v"):
        overlaps(one, {"v": factors(a, b)})
    with pytest.raises(LoraFxError, match="first adapter does not adapt v"):
        overlaps(one, {**one, "v": factors(a, b)})
    with pytest.raises(LoraFxError, match="its rank is 13, and a weight of 20×12 has no more than 12"):
        factors(gaussian(13, 12), gaussian(20, 13))
    with pytest.raises(LoraFxError, match="B is zero"):
        factors(a, torch.zeros_like(b))
    with pytest.raises(LoraFxError, match="A holds NaN"):
        factors(a / 0 * 0, b)
    with pytest.raises(LoraFxError, match="its scale alpha / rank is not known"):
        amplification(factors(a, b, None, gaussian(20, 12)))
    with pytest.raises(LoraFxError, match="its base weight is not there"):
        amplification(factors(a, b))
    with pytest.raises(LoraFxError, match="rank 4: δ has 3 directions"):
        amplification(factors(a, b, 1.0, gaussian(20, 12)), rank=4)
    with pytest.raises(LoraFxError, match="another model's"):
        amplification(factors(a, b, 1.0, gaussian(20, 11)))
    with pytest.raises(LoraFxError, match="W is zero"):
        amplification(factors(a, b, 1.0, torch.zeros(20, 12).double()))
    with pytest.raises(LoraFxError, match="12 components, those of the other 10"):
        phi(orthonormal(12, 2, 0), orthonormal(10, 2, 0))
    with pytest.raises(LoraFxError, match="of='C'"):
        one["w"].directions("C")


def test_sources_that_hold_no_factors_are_refused(tmp_path):
    model = adapted(0)
    with pytest.raises(AdapterError, match="no adapter named 'x'"):
        read_adapter(model, "x")
    with pytest.raises(LoraFxError, match="is folded into its weights"):
        read_adapter(lora_fx.fold(model, copy=True))
    with pytest.raises(FileError, match="there is no such folder"):
        read_adapter(tmp_path / "nothing")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(FileError, match="it has no lora_A"):
        read_adapter(tmp_path / "w.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(FileError, match="cannot be read"):
        read_adapter(tmp_path / "junk.safetensors")
    biased = lora_fx.apply(nn.Sequential(nn.Linear(4, 4)), Rule(where="*", kind="full"), torch.randn(2, 4))
    with pytest.raises(LoraFxError, match="its kind 'full' has no factors"):
        read_adapter(biased)
    lora_fx.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FileError, match="it holds no"):
        with_base(read_adapter(tmp_path / "adapter"), tmp_path / "w.safetensors")
    save_file({"0.weight": torch.ones(3, 3), "2.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraFxError, match="the base weight is 3×3, the adapter for 20×12"):
        with_base(read_adapter(tmp_path / "adapter"), tmp_path / "other.safetensors")
    square = Factors("w.weight", gaussian(2, 4), gaussian(4, 2), None, None, None)
    save_file({"w.weight": torch.eye(4)}, tmp_path / "square.safetensors")
    with pytest.raises(LoraFxError, match="the weight is square"):
        with_base({"w.weight": square}, tmp_path / "square.safetensors")


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Adapters of two ranks beside their base model."""
    folder = tmp_path_factory.mktemp("adapters")
    for rank in (2, 5):
        lora_fx.save_adapter(adapted(rank, rank), folder / f"r{rank}")
    model = adapted(0)
    save_file({f"{n}.weight": model[n].weight.detach() for n in (0, 2)}, folder / "base.safetensors")
    return folder


def test_paper_subspaces(saved, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["paper", "subspaces", str(saved / "r2"), str(saved / "r5"), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == ["phi.png", "phi_over_layers.png", "subspaces.json", "subspaces.txt"]
    assert (out / "subspaces.txt").read_text() == text
    said = json.loads((out / "subspaces.json").read_text())
    found = overlaps(read_adapter(saved / "r2"), read_adapter(saved / "r5"))
    assert [row["phi"] for row in said["rows"]] == [o.phi.tolist() for o in found]
    assert [(row["weight"], row["of"], row["ranks"]) for row in said["rows"]] == [
        (name, of, [2, 5]) for name in ("0.weight", "2.weight") for of in "AB"
    ]
    assert f"{float(found[0].phi[0, 0]):.3f}" in text
    assert all((out / name).read_bytes().startswith(PNG) for name in ("phi.png", "phi_over_layers.png"))


def test_paper_amplification(saved, tmp_path, capsys):
    arguments = ["paper", "amplification", str(saved / "r5"), "--base", str(saved / "base.safetensors"), "-o"]
    assert main([*arguments, str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "amplification.txt").read_text() == text
    said = json.loads((tmp_path / "amplification.json").read_text())
    found = amplification(with_base(read_adapter(saved / "r5"), saved / "base.safetensors")["0.weight"])
    assert said["rows"][0] == json.loads(json.dumps(found.to_json())) and f"{found.factor:.4g}" in text
    assert (tmp_path / "amplification.png").read_bytes().startswith(PNG)


def test_a_command_that_is_refused_writes_nothing(saved, tmp_path, capsys, monkeypatch):
    assert main(["paper", "subspaces", str(saved / "r2"), str(tmp_path / "x"), "-o", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lora-fx: ") and "there is no such folder" in err
    (tmp_path / "file").write_text("mine")
    assert main(["paper", "subspaces", str(saved / "r2"), str(saved / "r5"), "-o", str(tmp_path / "file")]) == 2
    assert "the results cannot be written" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["paper", "subspaces", str(saved / "r2"), str(saved / "r5"), "-o", str(tmp_path / "out")]) == 2
    assert "pip install 'lora-fx[paper]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
