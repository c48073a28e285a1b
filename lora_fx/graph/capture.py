"""Capture: a model and example inputs become one concrete `torch.fx` graph, for reading.

`make_fx` runs the model once on the example inputs and records what it did at the ATen level, with `linear`, `matmul`
and `scaled_dot_product_attention` still whole. The run leaves no trace: buffers, random state, train/eval flags and
gradient mode are what they were, bit for bit.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from lora_fx.changes import FAST_PATHS, ONEDNN, Switch, foreign, in_turn, onednn_has, safe_point
from lora_fx.errors import CaptureError
from lora_fx.graph.own_state import uncompiled, undisturbed
from lora_fx.graph.places import hooks_aside, is_torchs, refuse_lazy, refuse_preloaded, refuse_shards
from lora_fx.graph.written import Detached, Looking, Writes, know

MODULE = "lora_fx_module"  # node.meta key: the path of the module whose forward executed the node
TRANSFORMED = "lora_fx_transformed"  # node.meta key: it ran inside of a transform of torch.func (vmap, grad, jvp)


class _Recording(threading.local):
    """Whether this thread is recording a program that is to be read: what has several orders takes the plainest."""

    on = False


recording = _Recording()


def _set_for_now(owner: Any, name: str, value: Any) -> contextlib.AbstractContextManager[None]:
    return Switch(partial(getattr, owner, name), partial(setattr, owner, name)).set_for_now(value)


def recorded() -> contextlib.AbstractContextManager[None]:
    """In this thread, every schedule is `branch`: for programs that are to be read."""
    return _set_for_now(recording, "on", True)


@dataclass(frozen=True)
class Inputs:
    """Example inputs, as the model is called with them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Capture:
    """The whole-model graph and which placeholder is which parameter or buffer."""

    graph: fx.Graph
    module: fx.GraphModule
    tensors: dict[fx.Node, torch.Tensor]
    """Each node that stands for a parameter, buffer or constant of the model → that tensor."""
    inputs: Inputs
    outputs: tuple[torch.Tensor, ...] = ()
    """What the model gave while it was recorded; of a model on meta, tensors without numbers."""
    lowered: bool = False
    """It was recorded below transforms and autograd."""
    replaced: tuple[nn.Parameter, ...] = ()
    """Those that the model gives other numbers while it runs, by ``p.data = …``: no node shows that."""

    @property
    def transformed(self) -> bool:
        """Some of it ran inside of a transform of torch.func, where values are none that the graph can be given."""
        return any(node.meta.get(TRANSFORMED) for node in self.graph.nodes)


def normalize_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """A tensor, a tuple or list of positional inputs, or a mapping of keyword inputs; None asks the model."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if example_inputs is None:
        example_inputs = getattr(model, "dummy_inputs", None)
        if example_inputs is None:
            raise CaptureError(
                f"{type(model).__name__} has no example inputs",
                place="example_inputs",
                remedy="pass example_inputs: a tensor, a tuple of positional or a dict of keyword inputs",
            )
    if isinstance(example_inputs, Mapping):
        return Inputs((), {**example_inputs, **({} if "use_cache" in example_inputs else _without_cache(model))})
    many = isinstance(example_inputs, tuple | list)
    return Inputs(tuple(example_inputs) if many else (example_inputs,), _without_cache(model))


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """transformers' models return a cache object by default; it is no part of the function."""
    if getattr(getattr(model, "config", None), "use_cache", None) is None:
        return {}
    with contextlib.suppress(TypeError, ValueError):  # a forward without a signature
        if "use_cache" in inspect.signature(model.forward).parameters:
            return {"use_cache": False}
    return {}


def no_fast_paths() -> contextlib.AbstractContextManager[None]:
    """torch's fused encoder kernels read weights that no trace shows: switch them off."""
    return FAST_PATHS.set_for_now(False)


@contextlib.contextmanager
def as_python() -> Iterator[None]:
    """What `torch.compile` has made of modules and functions runs as Python: no trace sees into it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing that takes a second
        yield
        return
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        yield


@contextlib.contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, all of a model that is partly on meta is there: buffers, and factors that a file gave numbers."""
    tables: list[dict[str, Any]] = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    places = [(t, name, old) for t in tables for name, old in t.items() if old is not None and not old.is_meta]
    made: dict[int, torch.Tensor] = {}  # one for each: tied ones stay tied
    try:
        for table, name, old in places:
            new = old.detach().to("meta")
            table[name] = made.setdefault(id(old), nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new)
        with hooks_aside(model):
            yield
    finally:
        for table, name, old in places:
            table[name] = old


def inputs_on_meta(inputs: Inputs) -> Inputs:
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def capture_graph(model: nn.Module, example_inputs: Any = None, lowered: bool = False, as_is: bool = False) -> Capture:
    """Run `model` once and record the concrete graph of what it did. A model on meta runs there.

    Args:
        as_is: in the mode it is in; else in eval mode.
        lowered: record what is left below transforms and autograd: in other ops, each of which can be run again.

    Raises:
        CaptureError: the model rejects the inputs, is scripted, or returns no tensor.
    """
    refuse_unready(model)
    inputs = normalize_inputs(model, example_inputs)
    with in_turn():  # tracing patches torch, here and in torch.fx
        if not any(parameter.is_meta for parameter in model.parameters()):
            return _capture(model, inputs, lowered, as_is)
        own = _state(model)
        with on_meta(model):
            made = dict(zip(map(id, _state(model)), own, strict=True))
            found = _capture(model, inputs_on_meta(inputs), lowered, as_is)
    tensors = {node: made.get(id(tensor), tensor) for node, tensor in found.tensors.items()}
    replaced: Any = tuple(made.get(id(tensor), tensor) for tensor in found.replaced)
    return replace(found, tensors=tensors, inputs=inputs, replaced=replaced)


def _state(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _capture(model: nn.Module, inputs: Inputs, lowered: bool, as_is: bool) -> Capture:
    state = _state(model)
    flat, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    leaves = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    outputs: list[torch.Tensor] = []

    def run(tensors: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        given = iter(leaves)
        traced = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        args, kwargs = pytree.tree_unflatten(traced, spec)
        outputs[:] = output_tensors(model(*args, **kwargs))
        return list(outputs)

    with undisturbed(model) as writes, no_fast_paths(), as_python(), recorded(), torch.no_grad(), stoppable():
        if not as_is:
            model.eval()
        module = _make_fx(model, run, state, leaves, lowered, writes)
        know(model)
    tensors = dict(zip(module.graph.find_nodes(op="placeholder"), state, strict=False))
    for node in module.graph.find_nodes(op="get_attr"):
        if isinstance(value := getattr(module, node.target, None), torch.Tensor):
            tensors[node] = value
    return Capture(module.graph, module, tensors, inputs, tuple(outputs), lowered, writes.replaced)


def _make_fx(model: nn.Module, run: Any, tensors: list, leaves: list, lowered: bool, writes: Writes) -> fx.GraphModule:
    # Without data, only fake tensors let a model see that it is being traced and leave its data-dependent checks out.
    mode: Literal["fake", "real"] = "fake" if any(t.is_meta for t in tensors) else "real"
    trace = proxy_tensor.make_fx(
        run,
        tracing_mode=mode,
        pre_dispatch=not lowered,
        _allow_non_fake_inputs=True,
        _error_on_data_dependent_ops=False,
    )
    try:
        with (
            _module_paths(model),
            _described_in_one_mode(),
            _kernels_of_eager_mode(tensors),
            _seen_by(writes),
            Detached(),
        ):
            return trace(tensors, leaves)
    except CaptureError:
        raise
    except Exception as error:
        with Looking(writes), uncompiled():
            runs = mode == "real" and _runs(run, tensors, leaves)
        raise (_not_recorded(model, error) if runs else does_not_run(model, error)) from error


def _seen_by(writes: Writes) -> contextlib.AbstractContextManager[None]:
    """Each op that is recorded, before it runs."""
    return _set_for_now(proxy_tensor, "proxy_call", writes.recorded(proxy_tensor.proxy_call))


def _kernels_of_eager_mode(tensors: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """While it traces, torch hands a bfloat16 LSTM to oneDNN on CPUs whose oneDNN has none; eager mode does not."""
    lacking = any(t.dtype in (torch.bfloat16, torch.float16) and not onednn_has(t.dtype) for t in tensors)
    return ONEDNN.set_for_now(False) if lacking else contextlib.nullcontext()


def _runs(run: Any, tensors: list, leaves: list) -> bool:
    """Whether the model runs on these inputs where nobody records it."""
    try:
        run(tensors, leaves)
    except Exception:
        return False
    return True


def _not_recorded(model: nn.Module, error: Exception) -> CaptureError:
    """What to raise where a model runs on its inputs, and not while it is recorded."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    odd = [f"{name} is a {type(t).__module__}.{type(t).__qualname__}" for name, t in tensors if not is_torchs(t)]
    return CaptureError(
        f"it runs on the example inputs, but not while torch's make_fx records it: {type(error).__name__}: {error}"
        + (f" ({', '.join(odd[:3])}: no plain tensor)" if odd else ""),
        place=type(model).__name__,
        remedy="try it with plain tensors of ordinary layout, as parameters, buffers and inputs",
    )


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, where torch traces, each node that is recorded is a safe point."""
    create: Any = fx.proxy.TracerBase.create_node

    def create_node(tracer: fx.Tracer, *args: Any, **kwargs: Any) -> fx.Node:
        safe_point()
        return create(tracer, *args, **kwargs)

    with foreign(), _set_for_now(fx.proxy.TracerBase, "create_node", create_node):
        yield


def does_not_run(model: nn.Module, error: Exception) -> CaptureError:
    """What to raise where a model rejects its inputs."""
    return CaptureError(
        f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}",
        place="example_inputs",
        remedy="pass inputs that model(*inputs) or model(**inputs) accepts, on the model's own device",
    )


@contextlib.contextmanager
def _described_in_one_mode() -> Iterator[None]:
    """`make_fx` describes each result of a real run by a fake tensor of a mode of its own, which holds a traceback:
    two fifths of the time that a capture takes, in torch 2.13. One mode will do."""
    mode, here = FakeTensorMode(), threading.get_ident()
    describe: Any = proxy_tensor.extract_val

    def described(value: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_fake(value) or threading.get_ident() != here:
            return describe(value, *args, **options)
        if value.layout == torch.strided:
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        else:  # it has no strides
            meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return FakeTensor(mode, meta, value.device)  # as the mode would make it, without a dispatch

    with _set_for_now(proxy_tensor, "extract_val", described):
        yield


@contextlib.contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Inside, each recorded node is stamped with the path of the module whose forward is running."""
    paths = {module: name for name, module in reversed(list(model.named_modules()))}
    stack: list[str] = []
    here = threading.get_ident()  # the hooks are global: other threads may be running other models
    create: Any = fx.proxy.TracerBase.create_node

    def enter(module: nn.Module, args: Any) -> None:
        if torch.compiler.is_dynamo_compiling():  # a branch of `torch.cond`; what is below could not be compiled
            return
        if threading.get_ident() == here:
            stack.append(paths.get(module, stack[-1] if stack else ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        if threading.get_ident() == here:
            stack.pop()

    def create_node(tracer: fx.Tracer, *args: Any, **kwargs: Any) -> fx.Node:
        node = create(tracer, *args, **kwargs)
        node.meta[MODULE] = stack[-1] if stack else ""
        if torch._C._are_functorch_transforms_active():
            node.meta[TRANSFORMED] = True
        return node

    hooks = nn.modules.module
    with (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
        _set_for_now(fx.proxy.TracerBase, "create_node", create_node),
    ):
        yield


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors a model returns, in order, out of any nesting of containers.

    Raises:
        CaptureError: there is none.
    """
    leaves = [t for t in pytree.tree_leaves(_plain(output)) if isinstance(t, torch.Tensor)]
    floats = [t for t in leaves if t.is_floating_point() or t.is_complex()]
    if not floats:
        raise CaptureError(
            f"the model returns {type(output).__name__} with no floating-point tensor in it",
            place="output",
            remedy="adapt a model that returns a tensor, or a tuple, list, dict or dataclass of tensors",
        )
    return floats


def _plain(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {k: _plain(v) for k, v in output.items()}
    if isinstance(output, list | tuple):
        return [_plain(v) for v in output]
    if hasattr(output, "__dataclass_fields__"):
        return [_plain(getattr(output, name)) for name in output.__dataclass_fields__]
    return output


def refuse_unready(model: nn.Module) -> None:
    """Raise for what no later step could get right: parameters that do not exist yet or are in parts, scripted and
    exported modules."""
    refuse_lazy(model)
    refuse_shards(model)
    refuse_preloaded(model)
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule) and "eval" in module.__dict__:  # torch.export replaces train and eval
            raise CaptureError(
                "the module comes from torch.export: it shares its parameters with the model it was exported from",
                place=name or "the model",
                remedy="apply lora_fx to that model, or to copy.deepcopy(exported.module())",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{module.original_name} is a torch.jit.ScriptModule: its graph cannot be rewritten from Python",
                place=name or "the model",
                remedy="apply lora_fx to the module before torch.jit.script",
            )
