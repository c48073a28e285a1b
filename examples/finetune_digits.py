"""Adapt torch's own TransformerEncoder to rotated digits: apply by role, train, fold, verify.

python examples/finetune_digits.py          (needs scikit-learn; about ten seconds)
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx import Rule


class Reader(nn.Module):
    """An 8×8 image is a sentence of eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(8, 32), nn.Parameter(torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(images) + self.positions).mean(dim=1))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(20):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> str:
    return f"{(model(images).argmax(1) == labels).float().mean():.1%}"


torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small is fastest on one
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(labels))
learn, test = order[:1400], order[1400:]
rotated = images.rot90(dims=(1, 2))

model = Reader()
train(model, images[learn], labels[learn], rate=3e-3)
print("base, upright digits:    ", accuracy(model, images[test], labels[test]))
print("base, rotated digits:    ", accuracy(model, rotated[test], labels[test]))

rules = [Rule(role="attention.*", rank=4, alpha=8), Rule(role="mlp.*", rank=4, alpha=8)]
print(lora_fx.plan(model, rules, images[:2]))
lora_fx.apply(model, rules, images[:2])
train(model, rotated[learn], labels[learn], rate=1e-2)
print("adapted, rotated digits: ", accuracy(model, rotated[test], labels[test]))

adapted = copy.deepcopy(model)
lora_fx.fold(model)
print("folded, rotated digits:  ", accuracy(model, rotated[test], labels[test]))
print("folded against adapted:  ", lora_fx.verify(adapted, model, rotated[test]))
