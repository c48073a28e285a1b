"""Adapter folders while they are written: a crash, a refusal, and what stood there before."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Rule
from lora_fx.export.adapters import files as adapter_files
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model.inventory import inventory
from tests.adapters import TWO, Linears, adapted, assert_same, files, fresh, refused

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's


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
                assert files(tmp_path) == before or inventory(load_adapter(fresh(Linears), tmp_path / "a")).adapters
                assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
                assert_one_of(tmp_path / "a", old, new)
                continue
        assert_one_of(tmp_path / "a", new)
        save_adapter(old, tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").exists() == beside


def assert_one_of(folder: Path, *models: nn.Module) -> None:
    found = load_adapter(fresh(Linears), folder)
    assert inventory(found).adapters[0].rank in [inventory(m).adapters[0].rank for m in models]


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
