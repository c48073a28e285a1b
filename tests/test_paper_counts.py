"""The LoRA paper's tables of trainable parameters, counted by plans on its architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_fx.cli import main
from lora_fx.paper import counts
from lora_fx.paper.architectures import ARCHITECTURES
from lora_fx.paper.counts import CLAIMS, agreement

SIZES = {"RoBERTa base": (12, 768), "RoBERTa large": (24, 1024), "DeBERTa XXL": (48, 1536), "GPT-2 M": (24, 1024),
         "GPT-2 L": (36, 1280), "GPT-3": (96, 12288)}  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    out = tmp_path_factory.mktemp("counts")
    assert main(["paper", "counts", "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["counts.json", "counts.png", "counts.txt"]
    text = (out / "counts.txt").read_text(encoding="utf-8")
    assert "GPT-3 in 16 bits, r = 4 on q and v: 349.2 GB → 37.7 MB" in text
    assert text in (Path(__file__).parent.parent / "docs" / "paper.md").read_text(encoding="utf-8")
    return json.loads((out / "counts.json").read_text())


def test_every_lora_row_is_the_papers_formula_on_its_model(said):
    """|Θ| = 2·L̂·d·r (5.1), by a plan of the rules."""
    rows = [row for row in said["rows"] if row["method"] == "LoRA"]
    assert len(rows) == 23
    for row in rows:
        layers, width = SIZES[row["model"]]
        assert row["ours"] == 2 * layers * width * sum(int(word[2:]) for word in row["stated"].split()), row


def test_what_follows_from_stated_ranks_is_equal_and_what_does_not_is_named(said):
    others = [row for row in said["rows"] if row["equal"] == "no"]
    unequal = {(row["table"], row["model"], row["method"], row["stated"]) for row in others}
    assert unequal == {
        ("2", "RoBERTa base", "FT", ""), ("2", "RoBERTa large", "FT", ""), ("2", "DeBERTa XXL", "FT", ""),
        ("2", "RoBERTa large", "Adapter P", "r=64"), ("2", "RoBERTa large", "Adapter H", "r=64"),
        ("2", "DeBERTa XXL", "LoRA", "q=8 v=8"), ("3", "GPT-2 M", "FT", ""), ("3", "GPT-2 M", "LoRA", "q=4 v=4"),
        ("3", "GPT-2 L", "LoRA", "q=4 v=4"), ("4", "GPT-3", "FT", ""), ("4", "GPT-3", "BitFit", ""),
        ("4, 15", "GPT-3", "PreLayer", "l=16"), ("D.4", "GPT-3", "LoRA", "q=2 k=2 v=2 o=2"),
        *(("15", "GPT-3", "PreLayer", f"l={n}") for n in (4, 8, 36, 64)),
        ("15", "GPT-3", "LoRA", "q=64 k=64 v=64 o=64"), ("15", "GPT-3", "LoRA+PL", "q=8 v=8 l=12"),
    }  # fmt: skip
    assert all(row["remark"] for row in others)


def test_other_methods_are_the_papers_formulas(said):
    ours = {(row["model"], row["method"], row["stated"]): row["ours"] for row in said["rows"]}
    assert ours["GPT-3", "Adapter H", "r=1"] == 2 * 96 * (2 * 12288 * 1 + 1 + 12288) == 7_078_080
    assert ours["GPT-3", "Adapter H", "r=8"] == 40_109_568
    assert ours["RoBERTa large", "Adapter P", "r=16"] == 24 * (2 * 1024 * 16 + 16 + 1024)
    assert ours["GPT-3", "PreEmbed", "l=264"] == 264 * 12288 and ours["GPT-3", "PreLayer", "l=16"] == 16 * 96 * 12288
    assert ours["GPT-3", "LoRA+PE", "q=8 v=8 l=12"] == ours["GPT-3", "LoRA", "q=8 v=8"] + 12 * 12288
    assert ours["GPT-3", "LoRA+PL", "q=8 v=8 l=12"] == ours["GPT-3", "LoRA", "q=8 v=8"] + 12 * 96 * 12288
    assert ours["GPT-3", "BitFit", ""] == 96 * 11 * 12288 + 12288
    assert ours["GPT-2 M", "FT Top2", ""] == 2 * (12 * 1024**2 + 13 * 1024)
    assert ours["GPT-2 L", "FT", ""] == 774_030_080 and ours["GPT-3", "FT", ""] == 174_604_259_328
    with_norms = counts._Counted(ARCHITECTURES["RoBERTa base"]).bottlenecks(3, ("down",), norm=True)  # Adapter L
    assert with_norms == 12 * (2 * 768 * 3 + 3 + 768) + 2 * 12 * 768


def test_a_checkpoint_is_ten_thousand_times_smaller(said):
    assert said["checkpoint"] == {"whole": 2 * 174_604_259_328, "adapter": 2 * 18_874_368}


@pytest.mark.parametrize(
    ("theirs", "ours", "equal"),
    [
        ("18.8", 18_874_368, "cut"), ("7.1", 7_078_080, "rounded"), ("4.7", 4_718_592, "yes"),
        ("18", 18_874_368, "cut"),
        ("0.35", 393_216, "no"), ("19", 18_874_368, "rounded"), ("4.7", 4_800_000, "no"),
    ],
)  # fmt: skip
def test_digits_are_cut_or_rounded(theirs, ours, equal):
    assert agreement(theirs, ours) == equal


def test_nothing_is_allocated():
    assert {claim.model for claim in CLAIMS} == set(ARCHITECTURES) == set(SIZES)
    model = ARCHITECTURES["GPT-3"].on_meta()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
