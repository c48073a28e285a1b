"""`lora-fx demo`: the main job on real data, measured.

    train on handwritten digits  →  rotate them: the base fails  →  LoRA on query and value  →  fold  →  ONNX

Everything is run for its numbers: accuracies are ONNX Runtime's, on held-out digits; latencies are paired.
One thread throughout: the model is small, and the numbers then depend on the seed alone.
"""

from __future__ import annotations

import importlib
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx.analysis.rules import Rule
from lora_fx.checks.verification import Report
from lora_fx.errors import FileError, LoraFxError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

RULE = Rule(role="attention.query | attention.value", rank=4, alpha=8, dropout=0.05)
UPRIGHT, ROTATED = "upright", "rotated 90°"
MODEL, ADAPTER, PICTURE = "model.onnx", "adapter", "figure.png"

_PACKAGES = {
    "sklearn": "scikit-learn", "matplotlib": "matplotlib", "onnx": "onnx", "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime", "rich": "rich",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    epochs: int
    rate: float
    decay: float = 0.0
    batch: int = 128


@dataclass(frozen=True)
class Settings:
    base: Training
    lora: Training
    rounds: int
    """How often each ONNX file is timed."""


FULL = Settings(Training(40, 8e-3, decay=0.05), Training(50, 2e-2), rounds=3000)
QUICK = Settings(Training(6, 1e-2, decay=0.05, batch=64), Training(6, 3e-2, batch=64), rounds=200)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.back = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.back(mixed.transpose(1, 2).flatten(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, patches, width) → (batch, heads, patches, width / heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm: both halves add to the stream of tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images (batch, 1, 8, 8) → logits (batch, 10), by way of sixteen patches of 2×2 pixels."""

    def __init__(self, width: int = 32, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


@dataclass(frozen=True)
class Split:
    """Digits (n, 1, 8, 8) with values in 0…1, and what they are (n,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def rotated(self) -> Split:
        return Split(self.images.rot90(dims=(2, 3)).contiguous(), self.labels)

    def tasks(self) -> dict[str, Split]:
        return {UPRIGHT: self, ROTATED: self.rotated()}


def load_splits(seed: int) -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits: three quarters to train on, one quarter held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images[:, None].astype("float32") / 16, digits.target
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Split(train_x, train_y), Split(test_x, test_y)


def train(model: nn.Module, data: Split, how: Training, step: Callable[[], None]) -> None:
    """Any loop will do: after `apply`, exactly the adapters have `requires_grad`. A step of the bar is an epoch."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=how.rate, weight_decay=how.decay)
    steps = how.epochs * math.ceil(len(data.labels) / how.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=steps)
    model.train()
    for _ in range(how.epochs):
        for batch in torch.randperm(len(data.labels)).split(how.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[batch]), data.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        step()
    model.eval()


@dataclass(frozen=True)
class Exported:
    """One ONNX file, run on the held-out digits of both tasks."""

    session: Any
    nodes: int
    wiring: tuple[tuple[str, ...], ...]
    """Every node of the graph: operator, inputs, outputs."""
    bytes: int
    predictions: dict[str, torch.Tensor]
    accuracy: dict[str, float]
    largest: float
    """The largest absolute difference of a logit, torch ↔ ONNX Runtime."""


def export(model: nn.Module, test: Split, path: Path, adapters: str = "folded") -> Exported:
    """Export with a dynamic batch, and run all of the held-out digits in torch and in ONNX Runtime."""
    import onnx

    from lora_fx.export.onnx.export import export_onnx
    from lora_fx.export.onnx.runtimes import CPU, open_session, quiet_options

    report = export_onnx(model, test.images[:2], path, dynamic_shapes={"images": {0: "batch"}}, adapters=adapters)
    options = quiet_options()
    options.intra_op_num_threads = torch.get_num_threads()
    session = open_session(str(path), [CPU], options)
    predictions, accuracy, largest = {}, {}, 0.0
    for task, data in test.tasks().items():
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: data.images.numpy()})[0])
        with torch.no_grad():
            largest = max(largest, float((logits - model(data.images)).abs().max()))
        predictions[task] = logits.argmax(dim=1)
        accuracy[task] = float((predictions[task] == data.labels).double().mean())
    wiring = tuple((n.op_type, *n.input, "→", *n.output) for n in onnx.load(path).graph.node)
    return Exported(session, report.nodes, wiring, report.bytes, predictions, accuracy, largest)


def time_sessions(sessions: list[Any], image: torch.Tensor, rounds: int, step: Callable[[], None]) -> torch.Tensor:
    """Microseconds, (rounds, sessions): every round times each session once, in an order drawn anew, so what else the
    machine does falls on all of them alike."""
    order = random.Random(0)
    feeds = [{session.get_inputs()[0].name: image.numpy()} for session in sessions]
    times = torch.zeros(20 + rounds, len(sessions), dtype=torch.float64)
    for turn in times:
        for which in order.sample(range(len(sessions)), len(sessions)):
            start = time.perf_counter_ns()
            sessions[which].run(None, feeds[which])
            turn[which] = (time.perf_counter_ns() - start) / 1000
        step()
    return times[20:]  # the first twenty warm up


@dataclass(frozen=True)
class Outcome:
    """What the demo measured."""

    base: Exported
    unfolded: Exported
    folded: Exported
    times: torch.Tensor
    """Microseconds for one digit, (rounds, 3): base, unfolded, folded."""
    parameters: int
    trainable: int
    adapter_bytes: int
    equivalence: Report
    """Folded against adapted, in torch."""
    restored: bool
    """Whether unfolding gave back every bit of every tensor."""
    test: Split

    @property
    def columns(self) -> tuple[Exported, Exported, Exported]:
        return self.base, self.unfolded, self.folded

    @property
    def same_graph(self) -> bool:
        """Whether folded and base are one graph, node for node and edge for edge."""
        return self.folded.wiring == self.base.wiring

    @property
    def slowdown(self) -> list[float]:
        """Each file's time over the base's: the median over the rounds of the ratio within a round."""
        return (self.times / self.times[:, :1]).median(dim=0).values.tolist()

    @property
    def quartiles(self) -> torch.Tensor:
        """(3, files): 25 %, 50 %, 75 %, in microseconds."""
        return self.times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)


def measure(folder: Path, settings: Settings, seed: int, progress: Progress) -> Outcome:
    from lora_fx.export.adapters.files import save_adapter

    learn, test = load_splits(seed)
    model = VisionTransformer()
    parameters = sum(p.numel() for p in model.parameters())
    with stage(progress, "training the base on upright digits", settings.base.epochs) as step:
        train(model, learn, settings.base, step)
    with tempfile.TemporaryDirectory() as scratch:
        with stage(progress, "exporting the base"):
            base = export(model, test, Path(scratch) / "base.onnx")

        lora_fx.apply(model, RULE, test.images[:2])
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with stage(progress, "training the adapter on rotated digits", settings.lora.epochs) as step:
            train(model, learn.rotated(), settings.lora, step)
        save_adapter(model, folder / ADAPTER)

        with stage(progress, "folding and exporting", 2) as step:
            unfolded = export(model, test, Path(scratch) / "unfolded.onnx", adapters="unfolded")
            step()
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            equivalence = lora_fx.verify(model, lora_fx.fold(model, copy=True), test.rotated().images)
            lora_fx.fold(model)
            folded = export(model, test, folder / MODEL)
            restored = same_bits(before, lora_fx.unfold(model).state_dict())
    sessions = [base.session, unfolded.session, folded.session]
    with stage(progress, "timing ONNX Runtime", settings.rounds) as step:
        times = time_sessions(sessions, test.rotated().images[:1], settings.rounds, step)
    size = sum(file.stat().st_size for file in (folder / ADAPTER).iterdir())
    return Outcome(base, unfolded, folded, times, parameters, trainable, size, equivalence, restored, test)


def same_bits(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(t.view(torch.int32), after[name].view(torch.int32)) for name, t in before.items()
    )


def require_packages() -> None:
    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LoraFxError(
                f"the demo needs {package}, which cannot be imported: {error}",
                place="lora-fx demo",
                remedy="pip install 'lora-fx[demo]'",
            ) from error


def prepare(folder: Path) -> None:
    """Make the folder; known before a minute of work, not after it, whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(
            f"the folder cannot be written: {error.strerror}", place=str(folder), remedy="choose another one with --out"
        ) from error


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Random numbers from this seed and one thread; afterwards both are what they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def progress_bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    return Progress(text, BarColumn(bar_width=28), TaskProgressColumn(), TimeElapsedColumn(), console=console)


@contextmanager
def stage(progress: Progress, title: str, steps: int = 1) -> Iterator[Callable[[], None]]:
    """A bar of its own; inside, call what comes back after each step; it is full afterwards."""
    task = progress.add_task(title, total=steps)
    yield lambda: progress.advance(task)
    progress.update(task, completed=steps)
