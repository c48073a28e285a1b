"""The command line: what each command says, as text and as JSON, and how it ends. From a shell: docs/command.md."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx import Rule
from lora_fx.cli import COMMANDS, command, main
from lora_fx.cli.checkpoints import _strength
from lora_fx.cli.given import read_model, read_rules
from lora_fx.cli.shown import progress
from lora_fx.errors import LoraFxError
from lora_fx.export.checkpoints import checkpoint
from lora_fx.export.onnx.export import ExportReport
from tests.documentation import ROOT

FACTORY = """
import torch
from torch import nn

def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.ones(3, 8)

def alone():
    return pair()[0]

def number():
    return 3

def wants():
    return pair(1)

def raises():
    raise ValueError("of its own")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a base, an adapter of it, a factory and a program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("small_factory", None)
    (tmp_path / "small_factory.py").write_text(FACTORY)
    scope: dict = {}
    exec(FACTORY, scope)
    model, x = scope["pair"]()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    torch.export.save(torch.export.export(model.eval(), (x,)), "small.pt2")
    lora_fx.apply(model, [Rule(where="*", rank=2)], x)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    lora_fx.save_adapter(model, "adapter")
    return tmp_path


def said(capsys, *arguments: str, code: int = 0):
    """The JSON that a command prints."""
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_checkpoints_by_json(place, capsys):
    folded = said(capsys, "fold", "base", "adapter=0.5", "-o", "out", "--keep")
    assert folded["tensors"] == ["0.weight", "2.weight"] and folded["kept_bytes"] > 0
    assert said(capsys, "verify", "out", "--base", "base", "--adapter", "adapter")["verified"] is True
    assert said(capsys, "unfold", "out", "-o", "back")["bytes"] == (place / "base" / "model.safetensors").stat().st_size
    assert (place / "back" / "model.safetensors").read_bytes() == (place / "base" / "model.safetensors").read_bytes()
    found = said(capsys, "extract", "base", "out", "-r", "2", "-o", "found")
    assert [row["rank"] for row in found["weights"]] == [2, 2] and found["energy"] > 0.99 and not found["ignored"]
    assert said(capsys, "inspect", "out")["folded"]["kept"] is True
    assert said(capsys, "inspect", "base/model.safetensors")["dtypes"] == {"F32": 4}
    adapter = said(capsys, "inspect", "adapter")
    assert adapter["r"] == 2 and len(adapter["tensors"]) == len(load_file("adapter/adapter_model.safetensors"))
    alone = said(capsys, "inspect", "adapter/adapter_model.safetensors")
    assert alone["what"] == "adapter" and said(capsys, "inspect", "base")["what"] == "checkpoint"
    assert main(["inspect", "adapter/adapter_model.safetensors"]) == 0 and "checkpoint" not in capsys.readouterr().out
    (place / "out" / "new").touch()
    wrong = said(capsys, "verify", "out", code=3)
    assert wrong["verified"] is False and "new is new" in wrong["reason"]
    assert main(["verify", "out"]) == 3 and "NOT as it was written" in capsys.readouterr().out


def test_models_by_json(place, capsys):
    for model in ("small.pt2", "small_factory:pair", "small_factory:alone"):
        planned = said(capsys, "plan", model, "--rule", "where=0,rank=3")
        assert [(row["weight"], row["rank"]) for row in planned["rows"]] == [("0.weight", 3)]
        assert planned["parameters"] == 3 * (8 + 16)
    (place / "rules.toml").write_text('[[rule]]\nwhere = "2"\nrank = 1\n')
    assert said(capsys, "plan", "small_factory:pair", "--rules", "rules.toml")["parameters"] == 20
    assert said(capsys, "certify", "small_factory:pair", "adapter")["certified"] is True


@pytest.mark.onnx
def test_exports_by_json(place, capsys):
    exported = said(capsys, "export", "small_factory:pair", "--adapter", "adapter", "--prove", "-o", "small.onnx")
    assert exported["form"] == "folded" and exported["proven"] and exported["operators"] == {"Gemm": 2, "Relu": 1}
    seen = said(capsys, "inspect", "small.onnx")
    assert seen["operators"] == exported["operators"] and seen["slots"] == 0
    assert seen["metadata"]["lora_fx.graph"] == exported["graph"]
    assert main(["inspect", "small.onnx"]) == 0 and "ONNX: ai.onnx 20, 3 nodes, 4 weights" in capsys.readouterr().out


def test_what_cannot_be_certified_ends_with_3(place, capsys, monkeypatch):
    from lora_fx.checks.certification import Certificate

    monkeypatch.setattr(Certificate, "__bool__", lambda self: False)
    assert said(capsys, "certify", "small_factory:pair", "adapter", code=3)["certified"] is False


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["plan", "nowhere", "--rule", "where=0,rank=2"], "'nowhere' is no model"),
        (["plan", "small_factory:pair"], "there is no rule"),
        (["plan", "small_factory:pair", "--rule", "rank"], "'rank' is no rule"),
        (["plan", "small_factory:pair", "--rule", "where=7,rank=2"], "7"),
        (["plan", "small_factory:nobody", "--rule", "rank=2"], "it cannot be made"),
        (["plan", "no_such_module:x", "--rule", "rank=2"], "it cannot be made"),
        (["plan", "small_factory:number", "--rule", "rank=2"], "it returns a int, and no module"),
        (["plan", "missing.pt2", "--rule", "rank=2"], "No such file"),
        (["plan", "small_factory.pt2", "--rule", "rank=2"], "it is no program of torch.export"),
        (["plan", "base", "--rule", "rank=2"], "transformers folder"),
        (["inspect", "small_factory.py"], "it is nothing that is known here"),
        (["inspect", "nowhere"], "No such file"),
        (
            ["fold", "base", "adapter", "adapter=0.5", "-o", "out"],
            "give it once, with the sum of its strengths: adapter=1.5",
        ),
        (["plan", "small_factory:pair", "--rule", "rank=2", "--rules", "rules.toml"], "it stands beside --rule"),
        (["plan", "small_factory:wants", "--rule", "rank=2"], "small_factory.py:16: TypeError: pair() takes 0"),
        (["plan", "small_factory:raises", "--rule", "rank=2"], "small_factory.py:19: ValueError: of its own"),
        (["plan", "no_syntax:x", "--rule", "rank=2"], "SyntaxError: '(' was never closed"),
        (["certify", "torn", "adapter"], "torn: SafetensorError"),
        (["export", "torn", "-o", "out"], "torn: SafetensorError"),
        (["extract", "base", "other", "-r", "2", "-o", "out"], "pass the base that it was tuned from"),
        (["fold", "base", "nowhere", "-o", "out"], "there is no such folder"),
        (["unfold", "base", "-o", "out"], "it has no lora_fx_fold.json"),
        (["verify", "base"], "it has no lora_fx_fold.json"),
        (["extract", "base", "base", "-r", "2", "-o", "out"], "no weight differs"),
        (["fold", "base"], "Missing argument"),
        (["extract", "base", "base", "-r", "0", "-o", "out"], "0 is not in the range"),
    ],
)
def test_what_is_refused_ends_with_2(arguments, reason, place, capsys):
    (place / "small_factory.pt2").write_text("no program")
    (place / "no_syntax.py").write_text("x = (")
    shutil.copytree(place / "base", place / "other")
    save_file({"head.weight": torch.zeros(2)}, place / "other" / "model.safetensors")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8)).save_pretrained(place / "torn")
    os.truncate(place / "torn" / "model.safetensors", 2000)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert reason in shown.err and not shown.out and not (place / "out").exists()


def test_json_is_json_and_a_reader_may_go(place, capfd, monkeypatch):
    """NaN is null; a pipe that is closed is no error, a full disk is one."""
    monkeypatch.setattr(ExportReport, "largest", math.nan)
    assert main(["export", "small_factory:pair", "-o", "small.onnx", "--json"]) == 0
    assert json.loads(capfd.readouterr().out, parse_constant=pytest.fail)["largest_difference"] is None
    program = f"{sys.executable} -c 'import sys; from lora_fx.cli import main; sys.exit(main())'"
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # then nothing is left for Python to flush at its end
    gone, full = (f"set -o pipefail; {program} {c}" for c in ("inspect adapter | true", "pipeline fold > /dev/full"))
    ended = [subprocess.run(["bash", "-c", c], capture_output=True, text=True) for c in (gone, full)]
    assert ended[0].returncode == 0 and not ended[0].stderr
    assert ended[1].returncode == 2 and "stdout: what was done cannot be shown: No space" in ended[1].stderr
    assert "Exception ignored" not in ended[1].stderr


def test_pefts_config_is_rules_on_the_command_line(place, capsys):
    (place / "c.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["2"]}))
    planned = said(capsys, "plan", "small_factory:pair", "--rules", "c.json")
    assert [(row["weight"], row["rank"]) for row in planned["rows"]] == [("2.weight", 3)]
    assert said(capsys, "plan", "small_factory:pair", "--rule", "where=2,rank=1,expect=1")["parameters"] == 20


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Whoever runs this may be root, who may read everything."""
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")

    def forbidden(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "open", forbidden, raising=False)
    with pytest.raises(LoraFxError, match="it cannot be read: PermissionError"):
        checkpoint.read_checkpoint(tmp_path)


def test_a_strength_comes_after_the_last_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=2").mkdir()
    assert [_strength(text) for text in ("a", "a=0.5", "a=-1e-1", "a=2", "a=2=3", "a=b")] == [
        ("a", 1.0), ("a", 0.5), ("a", -0.1), ("a=2", 1.0), ("a=2", 3.0), ("a=b", 1.0),
    ]  # fmt: skip


def test_rules_on_the_command_line_are_those_of_python():
    text = "role=attention.query|attention.value, rank=8, alpha=16, dropout=0.1"
    assert read_rules([text], None) == [
        {"role": "attention.query | attention.value", "rank": 8, "alpha": 16, "dropout": 0.1}
    ]


def test_what_a_model_reads_is_known_by_its_name(tmp_path):
    from transformers import ViTConfig, ViTModel, WhisperConfig, WhisperModel

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **small)).save_pretrained(tmp_path / "vit")
    given = read_model(str(tmp_path / "vit"))
    assert given.inputs["pixel_values"].shape == (1, 3, 8, 8) and not next(given.model.parameters()).is_meta
    assert next(read_model(str(tmp_path / "vit"), weights=False).model.parameters()).is_meta
    whisper = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_source_positions=8, max_target_positions=8,
    )  # fmt: skip
    WhisperModel(whisper).save_pretrained(tmp_path / "whisper")
    with pytest.raises(LoraFxError, match="it reads input_features, and nobody says of which shape"):
        read_model(str(tmp_path / "whisper"), weights=False)


def test_help_has_an_example_of_each_and_needs_no_torch():
    """Also completion, of commands and of their options."""
    code = f"""
import contextlib, io, sys
from lora_fx.cli import command, main
for name in {list(COMMANDS)!r}:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        main([name, "--help"])
    print(name, "torch" in sys.modules, "lora-fx " + name in shown.getvalue().partition("Example")[2])
from click.shell_completion import ShellComplete
complete = ShellComplete(command, {{}}, "lora-fx", "_LORA_FX_COMPLETE")
print(*(item.value for item in complete.get_completions(["fold"], "--")))
print(*(item.value for item in complete.get_completions([], "un")))
"""
    *helps, options, commands = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert [line.split()[0] for line in helps] == list(COMMANDS)
    assert all(line.split()[1] == "False" for line in helps)
    own = {"plan", "fold", "unfold", "extract", "inspect", "export", "verify", "certify"}
    assert {line.split()[0] for line in helps if line.endswith("True")} >= own
    assert {"--out", "--keep", "--leave-out", "--json"} <= {*options.split()} and commands == "unfold"


def test_progress_is_for_a_terminal(capsys, monkeypatch):
    with progress("fold") as tell:
        assert tell is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("fold") as tell:
        for done in (1, 2**20, 2**21):
            tell(done, 2**22)
            time.sleep(0.15)
    shown = capsys.readouterr()
    assert not shown.out and "fold" in shown.err and "/4.0 MiB" in shown.err
    assert re.search(r"[\d.]+ MB/s", shown.err) and re.search(r"0:00:0\d", shown.err)  # the rate, and the time left


def test_the_page_has_every_command():
    text = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    assert {name for name in COMMANDS if f"lora-fx {name}" not in text} == set()
    assert {*command.list_commands(None)} == {*COMMANDS}
