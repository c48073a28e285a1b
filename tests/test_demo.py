"""The command line, its demo on real data, and the scripts that users copy."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.cli import main
from lora_fx.cli.pipelines import _VERBS
from lora_fx.demo import experiment as demo
from lora_fx.demo import report as demo_report

ROOT = Path(__file__).parents[1]
ONE_WORKER = pytest.mark.xdist_group("demo")  # so that the demo runs once
PNG = b"\x89PNG\r\n\x1a\n"


# ── the demo, run once ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`lora-fx demo --quick`: exit code, folder, what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = main(["demo", "--quick", "--out", str(folder)])
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    return code, folder, printed.getvalue()


def cells(text: str, row: str) -> list[str]:
    """The three figures of a row of the table."""
    line = next(line for line in text.splitlines() if line.startswith(f"│ {row}"))
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


def numbers(text: str, row: str) -> list[float]:
    return [float(re.match(r"[\d.,e+-]+", cell)[0].replace(",", "")) for cell in cells(text, row)]


@pytest.mark.onnx
@ONE_WORKER
def test_the_demo_leaves_a_model_an_adapter_and_a_figure(quick):
    import onnx

    code, folder, text = quick
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "figure.png", "model.onnx"]
    assert (folder / "figure.png").read_bytes().startswith(PNG)
    assert len(onnx.load(folder / "model.onnx").graph.node) == numbers(text, "ONNX nodes")[2]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == demo.RULE.rank
    for name in ("model.onnx", "adapter/", "figure.png", folder.name):
        assert name in text


@pytest.mark.onnx
@ONE_WORKER
def test_the_table_says_what_must_hold(quick):
    _, _, text = quick
    upright, rotated = numbers(text, "accuracy, upright"), numbers(text, "accuracy, rotated")
    assert upright[0] > 40 > 25 > rotated[0]  # chance is 10
    assert rotated[1] == rotated[2] > rotated[0] + 10
    assert all(0 <= share <= 100 for share in upright + rotated)
    base, unfolded, folded = numbers(text, "ONNX nodes")
    assert base == folded == unfolded - 4 * 6
    assert cells(text, "trained parameters")[:2] == ["26,698", "1,536 = 5.8 %"]
    assert len(numbers(text, "max |torch")) == 3  # export_onnx has judged them, or there would be no table
    assert re.search(r"folded graph is the base's, node for node +yes", text)
    assert re.search(r"folded model is the adapted one +yes", text)
    assert re.search(r"unfolding gives back every bit +yes", text)


@pytest.mark.onnx
@ONE_WORKER
def test_the_table_of_latencies_is_ordered(quick):
    _, _, text = quick
    medians, paired = numbers(text, "one digit"), numbers(text, "  paired with base")
    assert paired[0] == 1 and all(0.2 < ratio < 5 for ratio in paired)
    for median, cell in zip(medians, cells(text, "  quartiles"), strict=True):
        low, high = map(float, cell.split("–"))
        assert 0 < low <= median <= high


@pytest.mark.onnx
@ONE_WORKER
def test_the_output_fits_a_terminal_of_a_hundred_columns(quick):
    _, folder, text = quick
    assert max(len(line) for line in text.splitlines() if str(folder) not in line) <= 100


# ── its parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_seed_decides_everything():
    def digest(seed: int) -> list[torch.Tensor]:
        with demo.one_thread(seed):
            learn, _ = demo.load_splits(seed)
            model = demo.VisionTransformer(width=8, depth=1, heads=2)
            demo.train(model, demo.Split(learn.images[:64], learn.labels[:64]), demo.Training(2, 1e-2), lambda: None)
            return [learn.labels, *model.state_dict().values()]

    first, again, other = digest(3), digest(3), digest(4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_no_digit_is_both_learnt_and_held_out():
    learn, test = demo.load_splits(0)
    assert len(learn.labels) + len(test.labels) == 1797
    assert learn.images.max() == 1 and learn.images.min() == 0
    both = torch.cat([learn.images, test.images]).flatten(1)
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(load_digits().data).float() / 16
    assert sorted(both.tolist()) == sorted(whole.tolist())


def test_rotation_turns_by_a_quarter_and_keeps_the_labels():
    split = demo.Split(torch.arange(64.0).reshape(1, 1, 8, 8), torch.tensor([5]))
    turned = split.rotated()
    assert turned.images[0, 0, 7, 0] == 0 and turned.images[0, 0, 0, 0] == 7  # counter-clockwise
    assert turned.labels is split.labels


def test_same_bits_sees_one_bit_and_the_sign_of_zero():
    before = {"w": torch.tensor([0.0, 1.0])}
    assert demo.same_bits(before, {"w": torch.tensor([0.0, 1.0])})
    assert not demo.same_bits(before, {"w": torch.tensor([-0.0, 1.0])})
    assert not demo.same_bits(before, {"v": torch.tensor([0.0, 1.0])})


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0, 0.2775)]
)
def test_the_interval_of_a_share_is_wilsons(share, n, low, high):
    assert tuple(round(bound, 4) for bound in demo_report.wilson_interval(share, n)) == (low, high)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(capsys, *arguments: str) -> str:
    """The one message of a command that is refused."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "onnx", "onnxruntime", "rich"])
def test_a_missing_package_is_named_with_its_cure(missing, monkeypatch, capsys, tmp_path):
    found = importlib.import_module

    def absent(name: str, *rest):
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return found(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    message = refused(capsys, "demo", "--out", str(tmp_path / "out"))
    assert message.startswith("lora-fx: ") and "pip install 'lora-fx[demo]'" in message
    assert demo._PACKAGES[missing] in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_training(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "inside"):
        message = refused(capsys, "demo", "--out", str(folder))
        assert str(folder) in message and "--out" in message
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root writes everywhere")
def test_a_read_only_folder_is_refused(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused(capsys, "demo", "--out", str(tmp_path / "out"))


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_fx.demo.run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "lora-fx: interrupted\n"


def test_every_option_reaches_the_demo(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("lora_fx.demo.run_demo", lambda folder, **rest: calls.append((folder, rest)))
    assert main(["demo"]) == 0
    assert main(["demo", "--out", str(tmp_path), "--seed", "7", "--quick"]) == 0
    assert calls == [(Path("lora_fx_demo"), dict(seed=0, quick=False)), (tmp_path, dict(seed=7, quick=True))]


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--version"], 0, f"lora-fx {importlib.metadata.version('lora-fx')}\n"),
        (["--help"], 0, "demo"),
        (["demo", "--help"], 0, "--quick"),
        (["paper", "--help"], 0, "subspaces"),
        ([], 2, "COMMAND"),
        (["dmeo"], 2, "dmeo"),
        (["demo", "--seed", "-1"], 2, "-1 is not in the range"),
        (["demo", "--seed", "x"], 2, "'x'"),
        (["pipeline", "nothing"], 2, "load_adapter"),
    ],
)
def test_what_the_command_answers(arguments, code, shown, capsys):
    assert main(arguments) == code
    assert shown in "".join(capsys.readouterr())


def test_it_answers_without_torch(tmp_path):
    code = "import sys; from lora_fx.cli import main; main({!r}); print('torch' in sys.modules, file=sys.stderr)"
    for arguments in (["--help"], ["--version"], ["paper", "--help"], ["demo", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stderr == "False\n", (arguments, done.stderr)


def test_a_shell_completes_commands_and_their_options(capsys, monkeypatch):
    monkeypatch.setenv("_LORA_FX_COMPLETE", "bash_complete")
    for words, shown in (("lora-fx p", {"paper", "pipeline", "plan"}), ("lora-fx demo --q", {"--quick"})):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            main([])
        assert {line.partition(",")[2] for line in capsys.readouterr().out.splitlines()} == shown


def test_the_pipelines_are_shown(capsys):
    assert main(["pipeline"]) == 0
    assert capsys.readouterr().out == f"{lora_fx.pipeline('apply', Rule(where='*', rank=8))}\n"
    for verb in _VERBS:
        assert main(["pipeline", verb]) == 0
        assert capsys.readouterr().out.startswith(f"{verb}\n")


def test_the_family_of_errors_is_what_the_command_catches(monkeypatch, capsys):
    def refuse(*_, **__):
        raise LoraFxError("it is so", place="here", remedy="do that")

    monkeypatch.setattr("lora_fx.demo.run_demo", refuse)
    assert refused(capsys, "demo") == "lora-fx: here: it is so\n  → do that\n"


# ── the examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_example(name: str) -> str:
    """As ``python -W error`` runs it, but in this process, where everything is imported already."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS="100"))
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(warnings.catch_warnings(action="error"))
        warnings.simplefilter("ignore", DeprecationWarning)
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def after(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(label)).removeprefix(label).strip()


def test_example_finetune_digits():
    text = run_example("finetune_digits")
    shares = {
        label: float(after(text, label).rstrip("%"))
        for label in (
            "base, upright digits:",
            "base, rotated digits:",
            "adapted, rotated digits:",
            "folded, rotated digits:",
        )
    }
    upright, fails, adapted, folded = shares.values()
    assert upright > 90 and fails < 40 and adapted > 85
    assert folded == adapted
    assert after(text, "folded against adapted:").startswith("equivalent")


def test_example_fused_and_tied():
    text = run_example("fused_and_tied")
    assert after(text, "freshly adapted = base, bit for bit:") == "True"
    assert after(text, "rows that folding changed, head by head (q k v):") == " ".join(["[8, 0, 0]"] * 4)
    assert after(text, "the embedding is bitwise what it was:") == "True"
    assert after(text, "folded against adapted:").startswith("equivalent")
    assert "attention.query" in after(text, "a typo:") + text


def test_example_budget_pass():
    text = run_example("budget_pass")
    assert "refused: pass 'budget': 640 parameters would be trained, and the budget is 500" in text
    assert after(text, "adapters after the refusal:") == "{}"
    assert after(text, "spent:") == "640 of 1,000 parameters"
    names = [line.split()[0] for line in text.partition("\npass")[2].splitlines()[2:10]]
    assert names[:5] == ["capture", "analyse", "select", "budget", "schedule"] and names[-1] == "check"
    assert {"  04-budget/spent.txt", "  07-rewrite/0.before.txt", "  07-rewrite/0.after.txt"} <= {*text.splitlines()}
    rewritten = text.partition("before and after the rewriting:")[2]
    assert "F.linear(input, self.weight, self.bias)" in rewritten and "weight_lora_default_b" in rewritten


def test_example_transformers_trainer():
    pytest.importorskip("transformers")
    text = run_example("transformers_trainer")
    before, adapted = (float(after(text, label).split()[0]) for label in ("base, loud text:", "adapted, loud text:"))
    assert adapted < before / 1.5
    folded = after(text, "folded writes")
    assert folded == after(text, "reloaded writes") and folded.upper() == folded
    assert after(text, "switched off writes") == after(text, "base writes")
