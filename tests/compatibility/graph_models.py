"""torch_geometric: one model for each kind of message passing, on a small random graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.compatibility import Model

NODES, EDGES, IN, OUT = 9, 30, 12, 16

#: class of torch_geometric.nn → settings beside the two widths
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "GCNConv": {}, "SAGEConv": {}, "GraphConv": {}, "GATConv": dict(heads=2), "GATv2Conv": dict(heads=2),
    "TransformerConv": dict(heads=2), "TAGConv": {}, "ARMAConv": dict(num_stacks=2, num_layers=2), "SGConv": dict(K=2),
    "ChebConv": dict(K=3), "LEConv": {}, "ClusterGCNConv": {}, "FiLMConv": {}, "SuperGATConv": dict(heads=2),
    "ResGatedGraphConv": {}, "GENConv": {}, "MFConv": dict(max_degree=2), "GeneralConv": {}, "FeaStConv": dict(heads=2),
    "EGConv": dict(num_heads=2), "WLConvContinuous": {}, "AntiSymmetricConv": {}, "FAConv": {}, "LGConv": {},
    "SSGConv": dict(alpha=0.1), "GatedGraphConv": {},
}  # fmt: skip
#: whole models of torch_geometric.nn
MODELS = ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")


class Net(nn.Module):
    """Two layers of one kind and a linear head."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, start: Any = None, **more: Any) -> torch.Tensor:
        for layer in self.layers:
            own = (edge_index,) if start is None else (start, edge_index)
            x = layer(x, *own, **more).relu()
        return self.head(x)


def _graph() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(NODES, IN), "edge_index": torch.randint(0, NODES, (2, EDGES))}


def _convolution(name: str) -> tuple[nn.Module, Any]:
    import torch_geometric.nn as geometric

    cls, settings = getattr(geometric, name), CONVOLUTIONS[name]
    if name in ("AntiSymmetricConv", "FAConv"):
        more = {"start": torch.randn(NODES, IN)} if name == "FAConv" else {}
        return Net([cls(IN, **settings), cls(IN, **settings)], IN), _graph() | more
    if name == "GatedGraphConv":
        return Net([cls(IN, 2)], IN), _graph()
    if name in ("LGConv", "WLConvContinuous"):
        return Net([cls()], IN), _graph()
    wide = OUT * (
        settings.get("heads", 1) if name in ("GATConv", "GATv2Conv", "TransformerConv", "SuperGATConv") else 1
    )
    return Net([cls(IN, OUT, **settings), cls(wide, OUT, **settings)], wide), _graph()


def _model(name: str) -> tuple[nn.Module, Any]:
    import torch_geometric.nn as geometric

    return getattr(geometric, name)(IN, OUT, num_layers=2, out_channels=5), _graph()


def _relational() -> tuple[nn.Module, Any]:
    from torch_geometric.nn import RGCNConv

    layers = [RGCNConv(IN, OUT, num_relations=3, num_bases=2), RGCNConv(OUT, OUT, num_relations=3)]
    return Net(layers, OUT), _graph() | {"edge_type": torch.randint(0, 3, (EDGES,))}


def _attentive() -> tuple[nn.Module, Any]:
    from torch_geometric.nn.models import AttentiveFP

    model = AttentiveFP(IN, OUT, 5, edge_dim=4, num_layers=2, num_timesteps=2)
    graph = _graph() | {"edge_attr": torch.randn(EDGES, 4), "batch": torch.zeros(NODES, dtype=torch.long)}
    return model, graph


def _edges() -> tuple[nn.Module, Any]:
    from torch_geometric.nn import GINEConv, NNConv, PNAConv

    def mlp(wide: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(wide, 16), nn.ReLU(), nn.Linear(16, out))

    layers = [
        GINEConv(mlp(IN, OUT), edge_dim=4),
        NNConv(OUT, OUT, mlp(4, OUT * OUT)),
        PNAConv(OUT, OUT, ["mean", "max", "std"], ["identity", "amplification"], torch.tensor([0, 2, 4, 3]), edge_dim=4,
                towers=2),
    ]  # fmt: skip
    return Net(layers, OUT), _graph() | {"edge_attr": torch.randn(EDGES, 4)}


def _gps() -> tuple[nn.Module, Any]:
    from torch_geometric.nn import GCNConv, GPSConv

    layers = [GPSConv(IN, GCNConv(IN, IN), heads=2), GPSConv(IN, GCNConv(IN, IN), heads=2, attn_type="performer")]
    return Net(layers, IN), _graph() | {"batch": torch.zeros(NODES, dtype=torch.long)}


OTHERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "RGCNConv": _relational, "AttentiveFP": _attentive, "GINE-NN-PNA": _edges,
    "GPSConv": _gps,
}  # fmt: skip


def models() -> Iterator[Model]:
    for name in CONVOLUTIONS:
        yield Model("torch_geometric", name, partial(_convolution, name))
    for name in MODELS:
        yield Model("torch_geometric", name, partial(_model, name))
    for name, make in OTHERS.items():
        yield Model("torch_geometric", name, make)
