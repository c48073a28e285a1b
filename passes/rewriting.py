"""The rewritten forward of one module: its own forward, traced while its weights read as adapted weights.

Tracing is a partial evaluation: `F.linear(x, self.weight)` meets an `AdaptedWeight` of proxies, which emits the base op
and the branch. Nothing is matched and patched afterwards, so a second matmul can never read a stale, un-adapted value.

A trace is only used where it cannot bake in a decision. Python code that tests `is None`, `isinstance`, `training` or
the gradient mode could decide otherwise on the next call: such a forward is left alone, and dispatches at run time.
"""

from __future__ import annotations

import dis
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.deltas import schedules
from lora_fx.deltas.adapted_weight import AdaptedWeight, Branch, dispatch
from lora_fx.deltas.adapter import Adapter, Dense
from lora_fx.deltas.realisation import Realisation
from lora_fx.graph import views
from lora_fx.graph.forms import op_name
from lora_fx.graph.views import View
from lora_fx.model import classes
from lora_fx.model.classes import Reader

_TORCH = os.path.dirname(torch.__file__)
_NN_MODULES = os.path.join(_TORCH, "nn", "modules")
_STANDARD = os.path.dirname(os.__file__) + os.sep
_ALGEBRA = tuple(os.path.dirname(file) + os.sep for file in (views.__file__, schedules.__file__))
_OWN = (*_ALGEBRA, *(os.path.dirname(file) + os.sep for file in (classes.__file__, __file__)))  # they run meanwhile
_DECIDES = frozenset({
    "isinstance", "issubclass", "hasattr", "type", "training", "is_grad_enabled", "is_inference_mode_enabled",
    "is_autocast_enabled", "is_tracing", "is_scripting", "is_compiling", "is_dynamo_compiling", "is_exporting",
    "requires_grad", "is_contiguous", "is_cuda", "is_meta", "device_type", "get_device",
})  # fmt: skip


class Untraceable(Exception):
    """Why a forward cannot be traced soundly."""


class Tracer(fx.Tracer):
    """Child modules are leaves; an adapted weight among the arguments of any op is dispatched."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        """For a graph that people read: a branch is nodes of its own, unless its schedule is given."""
        self.paths: dict[nn.Module, str] = {}
        self.thread = threading.get_ident()  # forwards of other models may be running in others

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return True

    # While fx traces, every module of the process calls these two: models that run in other threads go their own way.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._is_here() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._is_here() else attr_val

    def _is_here(self) -> bool:
        return threading.get_ident() == self.thread

    def path_of(self, module: nn.Module) -> str:
        if not self.paths:
            self.paths = {m: n for n, m in reversed(list(self.root.named_modules()))}
        if module not in self.paths:
            raise Untraceable(f"it reads a weight of {type(module).__name__}, which is none of its children")
        return self.paths[module]

    def attribute(self, path: str) -> fx.Proxy:
        return self.create_proxy("get_attr", path, (), {})

    def read(self, owner: nn.Module, attribute: str, children: tuple[str, ...]) -> Any:
        """`owner.<attribute>` as an adapted weight of proxies."""
        prefix = self.path_of(owner)
        prefix = f"{prefix}." if prefix else ""
        parameter = owner._parameters[attribute]
        assert parameter is not None, attribute
        base = self.attribute(prefix + attribute)
        dispatches = any(getattr(owner, child).realised == Realisation.DISPATCH for child in children)
        if dispatches and not isinstance(owner, fx.GraphModule):
            return base  # the attribute itself will read as an adapted weight when the rewritten forward runs
        adapters = {f"{prefix}{child}": getattr(owner, child) for child in children}
        branches = [self._branch(path, adapter) for path, adapter in adapters.items()]
        cast = any(adapter.dtype != parameter.dtype for adapter in adapters.values())
        adapted = AdaptedWeight(base, View.of(parameter.shape), branches, base, (), cast)
        return adapted if parameter.ndim > 1 else adapted.dense()

    def _branch(self, path: str, adapter: Adapter) -> Branch:
        """Of proxies; a kind without factors is called with the weight."""
        if not adapter.kind.low_rank:
            return Branch(adapter, Dense(adapter.layout, self._module(path)), None)
        drop = self._module(f"{path}.dropout") if adapter.dropout.p else None
        tensors = {name: self.attribute(f"{path}.{name}") for name in adapter._parameters}
        index = self.attribute(f"{path}.index") if hasattr(adapter, "index") else None
        return Branch(adapter, adapter.low_rank(tensors, index), drop)

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
        return super().create_arg(a)


def trace_forward(module: nn.Module, plain: bool = False, reader: Reader | None = None) -> fx.Graph:
    """The graph of `module.forward` with its children as leaves and its adapted weights as branches.

    Args:
        reader: what the model's adapted weights are read through; None where there are none.

    Raises:
        Untraceable: the forward decides something in Python that a later call could decide otherwise.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward is replaced on the instance (as accelerate does)")
    tracer = Tracer(plain)
    with (reader or Reader()).by(tracer), _watch() as seen:
        try:
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:  # control flow on values, unpacking of unknown length, …: fx has many names for it
            raise Untraceable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    for code in seen:
        if why := _decides(code):
            raise Untraceable(f"{code.co_qualname} {why}")
    graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op != "get_attr" and (n.op != "call_function" or n.is_impure())
    )
    return graph


def baked_attributes(module: nn.Module) -> frozenset[str]:
    """Plain attributes of the module that its traced code may have baked in."""
    cls: Any = type(module)  # hashable: mypy takes modules' `__hash__` for the class's
    own = {name for name in module.__dict__ if not name.startswith("_") and name != "training"}
    return frozenset(own & _names(cls))


@lru_cache(maxsize=1024)
def _names(cls: type) -> frozenset[str]:
    codes = [
        function.__code__
        for base in cls.__mro__
        if base is not nn.Module and base is not object
        for function in vars(base).values()
        if hasattr(function, "__code__")
    ]
    return frozenset(name for code in codes for name in code.co_names)


@contextmanager
def _watch() -> Iterator[set[CodeType]]:
    """The code objects of model code that run inside."""
    seen: set[CodeType] = set()
    depth = 0  # of calls below the algebra: a form's own functions, wherever they were written, are no model code

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal depth
        if event == "call" and (depth or frame.f_code.co_filename.startswith(_ALGEBRA)):
            depth += 1
        elif event == "call":
            seen.add(frame.f_code)
        elif event == "return" and depth:
            depth -= 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(before)
        seen -= {code for code in seen if not _is_model_file(code.co_filename)}


@lru_cache(maxsize=4096)
def _is_model_file(file: str) -> bool:
    """Whether code of this file belongs to a model, and not to what runs it."""
    if file.startswith(_NN_MODULES):
        return not file.endswith(("module.py", "container.py", "dropout.py", "utils.py"))
    if file.startswith("<lora_fx"):
        return True
    if file.startswith(("<", _TORCH + os.sep)) or file.startswith(_OWN):
        return False
    return not file.startswith(_STANDARD) or "site-packages" in file  # those lie inside the standard library's folder


@lru_cache(maxsize=4096)
def _decides(code: CodeType) -> str:
    """What in this code could go another way on the next call; empty if nothing."""
    named = sorted(_DECIDES & set(code.co_names))
    if named:
        return f"tests {named[0]}"
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IS_OP" or instruction.opname.endswith("NONE"):
            return "tests for None"
    return ""


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
                env[node] = _inline(tracer, child, args, kwargs, reader)
            else:
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


def _inline(tracer: Tracer, child: nn.Module, args: Any, kwargs: Any, reader: Reader) -> Any:
    """The child's forward, op by op, in the parent's graph."""
    for below in child.modules():
        if isinstance(below, Adapter):
            below.inlined = True
    prefix = tracer.path_of(child)
    graph = trace_forward(child, plain=True, reader=reader)
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
