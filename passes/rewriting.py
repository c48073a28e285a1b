"""The rewritten forward of one module: its own forward, traced while its weights read as adapted weights.

Tracing is a partial evaluation: `F.linear(x, self.weight)` meets an `AdaptedWeight` of proxies, which emits the base op
and the branch. Nothing is matched and patched afterwards, so a second matmul can never read a stale, un-adapted value.

A trace is only used where it is the forward, on every call and with its side effects: see `purity`. Any other forward
is left alone, and dispatches at run time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lora_fx.deltas.adapted_weight import AdaptedWeight, Branch, dispatch
from lora_fx.deltas.adapter import Adapter, Dense
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import essence
from lora_fx.graph.forms import op_name
from lora_fx.graph.views import View
from lora_fx.model.classes import Reader
from lora_fx.passes.purity import Untraceable, Watch


class Tracer(fx.Tracer):
    """Child modules are leaves; an adapted weight among the arguments of any op is dispatched."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        """For a graph that people read: a branch is nodes of its own, unless its schedule is given."""
        self.paths: dict[nn.Module, str] = {}
        self.tensors: dict[str, fx.Proxy] = {}
        self.absent = False
        self.adapted: dict[tuple[nn.Module, str], None] = {}
        """The adapted weights that have been read."""
        self.thread = threading.get_ident()  # forwards of other models may be running in others

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # While fx traces, every module of the process calls this: models that run in other threads go their own way.
        here = threading.get_ident() == self.thread
        return super().call_module(m, forward, args, kwargs) if here else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # what model code reads is seen by its watch

    def path_of(self, module: nn.Module) -> str:
        if not self.paths:
            self.paths = {m: n for n, m in reversed(list(self.root.named_modules()))}
        if module not in self.paths:
            raise Untraceable(f"it reads a weight of {type(module).__name__}, which is none of its children")
        return self.paths[module]

    def attribute(self, path: str) -> fx.Proxy:
        return self.create_proxy("get_attr", path, (), {})

    def tensor(self, owner: nn.Module, name: str) -> fx.Proxy:
        """`owner.<name>`, a tensor, or the None in the place of one: one node for all reads."""
        path = ".".join(filter(None, (self.path_of(owner), name)))
        if path not in self.tensors:
            self.tensors[path] = self.attribute(path)
            self.absent |= vars(owner).get(name, owner._parameters.get(name, owner._buffers.get(name))) is None
        return self.tensors[path]

    def read(self, owner: nn.Module, attribute: str, children: tuple[str, ...]) -> Any:
        """`owner.<attribute>` as an adapted weight of proxies."""
        self.adapted[owner, attribute] = None
        prefix = self.path_of(owner)
        prefix = f"{prefix}." if prefix else ""
        parameter = owner._parameters[attribute]
        assert parameter is not None, attribute
        base = self.tensor(owner, attribute)
        dispatches = any(getattr(owner, child).realised != Realisation.GRAPH for child in children)
        if dispatches and not isinstance(owner, fx.GraphModule):
            return base  # the attribute itself will read as an adapted weight when the rewritten forward runs
        adapters = {f"{prefix}{child}": getattr(owner, child) for child in children}
        branches = [self._branch(path, adapter) for path, adapter in adapters.items()]
        cast = any(adapter.dtype != parameter.dtype for adapter in adapters.values())
        adapted = AdaptedWeight(base, View.of(parameter.shape), branches, base, (), cast)
        return adapted if parameter.ndim > 1 else adapted.dense()

    def _branch(self, path: str, adapter: Adapter) -> Branch:
        """Of proxies; a kind without factors is called with the weight."""
        if not adapter.kind.is_delta:
            theta = adapter.theta_of({name: self.attribute(f"{path}.{name}") for name in adapter.tensors})
            return Branch(adapter, adapter.around(theta), None)
        if not adapter.kind.low_rank:
            return Branch(adapter, Dense(adapter.layout, self._module(path)), None)
        drop = self._module(f"{path}.dropout") if adapter.drops else None
        tensors = {name: self.attribute(f"{path}.{name}") for name in adapter._parameters}
        index = self.attribute(f"{path}.index") if hasattr(adapter, "index") else None
        scale = self.attribute(f"{path}.multiplier")  # live: it may be set to another
        return Branch(adapter, adapter.low_rank(tensors, index, scale), drop)

    def _module(self, path: str) -> Callable[[Any], fx.Proxy]:
        return lambda x: self.create_proxy("call_module", path, (x,), {})

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, AdaptedWeight))
        if not any(isinstance(leaf, AdaptedWeight) for leaf in leaves):
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "call_function":
            return dispatch(target, args, kwargs)
        if kind == "call_method":
            return dispatch(getattr(torch.Tensor, target), args, kwargs)
        raise Untraceable(f"it hands a weight to {target}")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, AdaptedWeight):
            raise Untraceable("it returns or stores a weight")
        if isinstance(a, torch.Tensor):  # fx would make it an attribute of the module
            raise Untraceable("it has a tensor that is no attribute")
        return super().create_arg(a)


@dataclass(frozen=True)
class Relied:
    """What a trace has relied on: as long as all of it is there still, another one would be the same."""

    owners: Mapping[str, nn.Module]
    """The modules that were read from, and those that the graph names, by their paths."""
    read: tuple[tuple[str, str], ...]
    """Path and attribute."""
    named: tuple[tuple[dict[str, Any], str, tuple[str, ...]], ...]
    """Scope, name, and the attributes that were read from there on."""


@dataclass(frozen=True)
class Traced:
    """A forward as a graph."""

    graph: fx.Graph
    baked: frozenset[str]
    """Immutable attributes and methods of the module that are in the graph."""
    absent: bool = False
    """It reads a None that stands in the place of a tensor."""
    relied: Relied | None = None
    """None where nobody can tell."""


class _EveryCall(TorchFunctionMode):
    """Each call of torch that model code makes is a node, also one on no argument that is traced."""

    def __init__(self, tracer: Tracer, watch: Watch) -> None:
        super().__init__()
        self.tracer, self.watch = tracer, watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        symbolic = any(isinstance(leaf, fx.Proxy | AdaptedWeight) for leaf in pytree.tree_leaves((args, kwargs)))
        if symbolic or not self.watch.follows_torch(sys._getframe()):
            return func(*args, **kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


def trace_forward(module: nn.Module, plain: bool = False, reader: Reader | None = None) -> Traced:
    """`module.forward` as a graph, with its children as leaves and its adapted weights as branches.

    Args:
        reader: what the model's adapted weights are read through; None where there are none.

    Raises:
        Untraceable: the graph would not be the forward on every call.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward is replaced on the instance (as accelerate does)")
    tracer = Tracer(plain)
    watch = Watch(module, tracer.tensor)
    try:
        with (reader or Reader()).by(tracer), watch.following(), _EveryCall(tracer, watch):
            graph = tracer.trace(module)
    except Untraceable:
        raise
    except fx.proxy.TraceError as error:  # control flow on values, unpacking of unknown length, …
        raise Untraceable(str(error).partition("\n")[0]) from error
    except Exception as error:
        raise Untraceable(f"its trace raises {essence(error).partition(chr(10))[0]}") from error
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op != "get_attr")
    return Traced(graph, frozenset(watch.read), tracer.absent, _relied(module, graph, tracer, watch))


def _relied(module: nn.Module, graph: fx.Graph, tracer: Tracer, watch: Watch) -> Relied | None:
    if not watch.lasting:
        return None
    read = [(tracer.path_of(owner), name) for owner, name in (*watch.touched, *tracer.adapted)]
    named = ((scope, name, path) for (_, name, path), scope in watch.named.items())
    targets = [(n.op, str(n.target)) for n in graph.nodes if n.op in ("get_attr", "call_module")]
    paths = {target if op == "call_module" else target.rpartition(".")[0] for op, target in targets}
    owners = {path: module.get_submodule(path) for path in ("", *paths, *(path for path, _ in read))}
    return Relied(owners, tuple(dict.fromkeys(read)), tuple(named))


def rewrite_graph(module: fx.GraphModule, inlined: Callable[[nn.Module], bool], reader: Reader) -> fx.Graph:
    """The graph of a GraphModule with branches: copied node by node, weights dispatched, adapted leaves inlined.

    Args:
        inlined: true for a called module that multiplies with an adapted weight; its forward is traced into the graph.
    """
    tracer = Tracer(plain=True)
    tracer.root = module
    tracer.graph = fx.Graph(tracer_cls=getattr(module, "_tracer_cls", None))
    tracer.graph._codegen = module.graph._codegen
    tracer.tensor_attrs = {}
    env: dict[fx.Node, Any] = {}
    with reader.by(tracer):
        for node in module.graph.nodes:
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            if node.op == "call_module" and inlined(child := module.get_submodule(str(node.target))):
                traced = trace_forward(child, plain=True, reader=reader)
                if not (traced.baked or traced.absent):  # else the call stays: setting one would not be noticed in here
                    env[node] = _inline(tracer, child, traced.graph, args, kwargs)
                    continue
            env[node] = _copy(tracer, module, node, args, kwargs)
    return tracer.graph


def _copy(tracer: Tracer, module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        value = getattr(module.get_submodule(owner), attribute)
        if isinstance(value, AdaptedWeight):
            return value
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, AdaptedWeight))
    if any(isinstance(leaf, AdaptedWeight) for leaf in leaves) and node.op in ("call_function", "call_method"):
        func = node.target if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
        return dispatch(func, args, kwargs)
    if node.op == "call_function" and op_name(node.target) == "getitem" and isinstance(args[0], tuple):
        return args[0][args[1]]
    proxy = tracer.create_proxy(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
    proxy.node.meta = dict(node.meta)
    return proxy


def _inline(tracer: Tracer, child: nn.Module, graph: fx.Graph, args: Any, kwargs: Any) -> Any:
    """The child's forward, op by op, in the parent's graph."""
    for below in child.modules():
        if isinstance(below, Adapter):
            below.inlined = True
    prefix = tracer.path_of(child)
    placeholders = iter(args)
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            env[node] = next(placeholders, kwargs.get(node.target, default))
            continue
        inner = fx.node.map_arg(node.args, env.__getitem__)
        inner_kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "output":
            return inner[0]
        target = f"{prefix}.{node.target}" if node.op in ("get_attr", "call_module") else node.target
        env[node] = tracer.create_proxy(node.op, target, inner, inner_kwargs)
    raise AssertionError("a graph has an output")
