"""Two small real tasks to compare methods on: a base model, trained here, and something else that it is to learn.

text    a character GPT that has read one half of Python's own topics (`pydoc_data.topics`), the one with more prose,
        learns the other half, which is full of code and tables: bits per character of the held-out tenth of that
digits  the demo's vision transformer, which reads upright digits, learns digits that lie on their side: how many of the
        held-out quarter are read wrong
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lora_fx.application.tokens import with_tokens
from lora_fx.demo import experiment


class Attention(nn.Module):
    """Causal; queries, keys, values and the way back have a matrix each, as the paper's Wq, Wk, Wv and Wo."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterGPT(nn.Module):
    """Characters (batch, time) → logits of the next one (batch, time, characters)."""

    def __init__(self, characters: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Effort:
    """How long something is trained."""

    steps: int
    batch: int
    rate: float


class Task(ABC):
    """What is learned, on top of what."""

    name: str
    unit: str
    """Of `score`; less is better."""
    base_effort: Effort
    effort: Effort
    """Of an adaptation; its rate is the method's."""
    width: int
    """Of the model, d."""
    reads: bool
    """Its inputs are ids, which an embedding looks up."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Fresh."""

    @abstractmethod
    def example(self) -> Any:
        """Inputs of the model."""

    @abstractmethod
    def before(self) -> torch.Tensor:
        """What the base is trained on, (examples, …)."""

    @abstractmethod
    def after(self) -> torch.Tensor:
        """What an adaptation is trained on; the first n are its low-data settings."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: torch.Tensor, placed: Placed) -> torch.Tensor:
        """A scalar to make small, in nats."""

    @abstractmethod
    def score(self, model: nn.Module, placed: Placed) -> float:
        """On what is held out of the new half."""

    def base(self, steps: int) -> nn.Module:
        """Trained, from seed 0."""
        with experiment.one_thread(0):
            model = self.model()
            how = Effort(steps, self.base_effort.batch, self.base_effort.rate)
            train(model, self, self.before(), how)
        return model.requires_grad_(False)


@dataclass(frozen=True)
class Placed:
    """What a method puts before the ids of a batch: tokens of its own, or nothing."""

    prefix: int = 0
    vocabulary: int = 0

    def into(self, ids: torch.Tensor) -> torch.Tensor:
        return with_tokens(ids, self.prefix, vocabulary=self.vocabulary) if self.prefix else ids

    def out_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """What belongs to the ids alone."""
        return outputs[:, self.prefix :]


def train(
    model: nn.Module,
    task: Task,
    data: torch.Tensor,
    how: Effort,
    placed: Placed | None = None,
    also: Any = None,
) -> None:
    """AdamW on what has ``requires_grad``, on batches drawn at random, up to the rate and down again.

    Args:
        also: a `lora_fx.Budget`, whose penalty is added, and which is told of each step.
    """
    placed = placed or Placed()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, how.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=max(how.steps, 2), pct_start=0.1)
    model.train()
    for _ in range(how.steps):
        batch = data[torch.randint(len(data), (min(how.batch, len(data)),))]
        loss = task.loss(model, batch, placed)
        (loss if also is None else loss + also.penalty()).backward()
        optimizer.step()
        if also is not None:
            also.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


class Text(Task):
    """Python's topics, by the share of letters and blanks in them."""

    name, unit, reads = "text", "bits per character", True
    base_effort, effort = Effort(3000, 16, 4e-3), Effort(300, 16, 0.0)
    width, depth, heads, context, room = 64, 4, 4, 64, 16
    """The base has read windows of context + room characters: an adaptation has room for tokens of its own."""

    @cached_property
    def _halves(self) -> tuple[list[str], list[str], list[str]]:
        """Characters, and the topics of the base and of the adaptation."""
        from pydoc_data.topics import topics

        def prose(text: str) -> float:
            return sum(c.isalpha() or c == " " for c in text) / max(len(text), 1)

        order = sorted(topics, key=lambda name: (-prose(topics[name]), name))
        sizes = [len(topics[name]) for name in order]
        half = next(n for n in range(len(order)) if 2 * sum(sizes[:n]) >= sum(sizes))
        texts = [topics[name] for name in order]
        return sorted(set("".join(texts))), texts[:half], texts[half:]

    def _windows(self, texts: list[str], held_out: bool, length: int) -> torch.Tensor:
        """Of so many characters and the next one, one window after the other; every tenth is held out."""
        ids = {c: n for n, c in enumerate(self._halves[0])}
        flat = torch.tensor([ids[c] for c in "".join(texts)])
        windows = flat[: len(flat) // (length + 1) * (length + 1)].view(-1, length + 1)
        kept = torch.arange(len(windows)) % 10 == 9
        return windows[kept] if held_out else windows[~kept]

    @property
    def characters(self) -> int:
        """How many there are: ids behind the last one are tokens of an adaptation's own."""
        return len(self._halves[0])

    def model(self) -> nn.Module:
        return CharacterGPT(self.characters, self.width, self.depth, self.heads, self.context + self.room)

    def example(self) -> torch.Tensor:
        return self.after()[:2, :-1]

    def before(self) -> torch.Tensor:
        return self._windows(self._halves[1], False, self.context + self.room)

    def after(self) -> torch.Tensor:
        windows = self._windows(self._halves[2], False, self.context)
        return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]

    def loss(self, model: nn.Module, batch: torch.Tensor, placed: Placed) -> torch.Tensor:
        logits = placed.out_of(model(placed.into(batch[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, placed: Placed) -> float:
        held_out = self._windows(self._halves[2], True, self.context)
        losses = [float(self.loss(model, part, placed)) * len(part) for part in held_out.split(128)]
        return math.fsum(losses) / len(held_out) / math.log(2)


class Digits(Task):
    """Images and labels travel as one tensor: (n, 65), the label last."""

    name, unit, reads = "digits", "% wrong", False
    base_effort, effort = Effort(1500, 64, 3e-3), Effort(300, 64, 0.0)
    width, depth, heads = 64, 3, 4

    @cached_property
    def _splits(self) -> tuple[experiment.Split, experiment.Split]:
        return experiment.load_splits(0)

    def model(self) -> nn.Module:
        return experiment.VisionTransformer(self.width, self.depth, self.heads)

    def example(self) -> torch.Tensor:
        return self._splits[0].images[:2]

    def before(self) -> torch.Tensor:
        return _packed(self._splits[0])

    def after(self) -> torch.Tensor:
        return _packed(self._splits[0].rotated())

    def loss(self, model: nn.Module, batch: torch.Tensor, placed: Placed) -> torch.Tensor:
        return F.cross_entropy(model(batch[:, :-1].reshape(-1, 1, 8, 8)), batch[:, -1].long())

    @torch.no_grad()
    def score(self, model: nn.Module, placed: Placed) -> float:
        held_out = self._splits[1].rotated()
        return 100.0 * float((model(held_out.images).argmax(1) != held_out.labels).double().mean())


def _packed(data: experiment.Split) -> torch.Tensor:
    return torch.cat([data.images.flatten(1), data.labels[:, None].to(data.images.dtype)], 1)


TASKS: dict[str, Task] = {task.name: task for task in (Text(), Digits())}


def base_of(task: Task, steps: int, folder: Path) -> tuple[nn.Module, Path]:
    """The base model, out of the folder where it is there."""
    from safetensors.torch import load_file, save_file

    model = task.model()
    label = hashlib.sha256(f"{task.name} {steps} {[(n, tuple(p.shape)) for n, p in model.named_parameters()]}".encode())
    path = folder / f"base-{task.name}-{label.hexdigest()[:8]}.safetensors"
    if not path.exists():
        half = path.with_suffix(".half")
        save_file(task.base(steps).state_dict(), half)
        half.replace(path)
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval(), path
