"""How a module comes to read adapted weights, and how it is put back.

A module is wired by giving it a generated subclass of its own class:

* ``graph``: the subclass has a forward of its own, generated from the traced graph with the branches in it;
* ``dispatch``: the subclass has a property in the place of the parameter, which reads as an `AdaptedWeight`. Whoever
  reads the weight gets the branches: another module, a fused kernel's Python front, an LSTM.

Modules whose generated code is the same share one class, so `torch.compile` compiles it once. The subclass names what
it was made from, so instances can be copied and pickled. All state lives in the model: `Adapter` children beside their
weight, and a mark on each module that is wired by graph.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from lora_fx.deltas.adapter import AdaptedWeight, Adapter, Factors
from lora_fx.errors import LoraFxError
from lora_fx.graph.views import View
from lora_fx.model.marks import fold_record
from lora_fx.model.tracing import Untraceable, active_tracer, baked_attributes, rewrite_graph, trace_forward

_READS = "_lora_fx_reads"  # mark: this module's forward is rewritten as a graph
_ORIGINAL = "_lora_fx_graph"  # the graph a GraphModule had before
_PRESERVED = "_user_preserved_attributes"  # in a GraphModule's meta: attributes that torch gives to its copies
_CONVERSIONS = "_lora_fx_conversions"  # how transformers would have rewritten the model's keys on saving
_SEPARATOR = "_lora_"
_IMPORT = "import "
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def child_name(attribute: str, adapter: str, part: str = "") -> str:
    """The name of the `Adapter` child beside its weight: ``weight_lora_default``, ``weight_lora_default_query``."""
    return f"{attribute}{_SEPARATOR}{adapter}" + (f"_{part.rpartition('.')[2]}" if part else "")


def attach(owner: nn.Module, child: str, adapter: Adapter, register: bool = True) -> None:
    """Put an adapter beside its weight. A tied weight's other owners refer to it without registering it twice."""
    if register:
        owner.add_module(child, adapter)
    else:
        owner.__dict__[child] = adapter


def detach(owner: nn.Module, child: str) -> None:
    owner._modules.pop(child, None)
    owner.__dict__.pop(child, None)


def adapters_of(owner: nn.Module) -> dict[str, Adapter]:
    """The adapters beside this module's own weights, by child name."""
    found = {name: child for name, child in owner._modules.items() if isinstance(child, Adapter)}
    found.update({name: child for name, child in owner.__dict__.items() if isinstance(child, Adapter)})
    return found


def attribute_of(child: str) -> str:
    return child.partition(_SEPARATOR)[0]


def is_shard(parameter: torch.Tensor | None) -> bool:
    """Whether this is one process's part of a parameter: of FSDP2, or of FSDP1, which makes it flat."""
    if "torch.distributed.tensor" in sys.modules and isinstance(parameter, torch.distributed.tensor.DTensor):
        return True
    return parameter is not None and parameter.dim() == 1 and hasattr(parameter, "_fsdp_flattened")


def refuse_displaced(model: nn.Module) -> None:
    """Raise where an adapted or folded weight is no parameter any more: its branch would be left out.

    Raises:
        LoraFxError: there is one.
    """
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            continue
        record = fold_record(module)
        for attribute in (*map(attribute_of, adapters_of(module)), *(record.attributes if record else ())):
            if attribute not in module._parameters:
                raise LoraFxError(
                    "since it was adapted the weight has ceased to be a parameter: something computes it now",
                    place=f"{path}.{attribute}".lstrip("."),
                    remedy="undo that (torch.nn.utils.parametrize.remove_parametrizations, prune.remove), or do it "
                    "after a final fold",
                )


def _refuse_derived(model: nn.Module) -> None:
    """Raise where another tool has derived a class from a generated one (a parametrization, `fully_shard`): with the
    generated class that one would go."""
    for path, module in model.named_modules():
        if is_generated(type(module), inherited=True) and not is_generated(type(module)):
            raise LoraFxError(
                f"since the module was adapted it has been given the class {type(module).__name__}, and would lose it",
                place=path or "the model",
                remedy="change the adapters before that, or undo it (torch.nn.utils.parametrize."
                "remove_parametrizations) and do it again",
            )


def plain_path(path: str) -> str:
    """A module's path in the model that `torch.compile`, FSDP1 or `checkpoint_wrapper` have wrapped parts of."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def find_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Adapter]]:
    """(path of the owner, owner, child name, adapter) of every adapter, tied owners included."""
    refuse_displaced(model)
    for path, module in model.named_modules():
        if not isinstance(module, Adapter):
            for child, adapter in adapters_of(module).items():
                yield path, module, child, adapter


@dataclass(frozen=True)
class Storage:
    """One weight storage as some of its owners read it: with these adapters."""

    owners: tuple[tuple[nn.Module, str], ...]
    adapters: tuple[Adapter, ...]
    split: bool
    """Other owners of the same storage read it with other adapters, or with none."""

    @property
    def parameter(self) -> nn.Parameter:
        owner, attribute = self.owners[0]
        return owner._parameters[attribute]  # type: ignore[return-value]

    def replace(self, parameter: nn.Parameter) -> None:
        """Give these owners another parameter."""
        for owner, attribute in self.owners:
            owner._parameters[attribute] = parameter


def adapted_storages(model: nn.Module) -> list[Storage]:
    """Every storage that an active adapter acts on, once for each set of adapters it is read with.

    Raises:
        LoraFxError: an adapted weight is sharded, or no parameter any more.
    """
    refuse_displaced(model)
    storages: dict[int, dict[tuple[Adapter, ...], list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            continue
        active = _active(module)
        for attribute, parameter in module._parameters.items():
            own = tuple(a for child, a in active.items() if attribute_of(child) == attribute)
            if own and is_shard(parameter):
                raise LoraFxError(
                    f"the weight is sharded: this process has {parameter.numel()} of its elements",
                    place=f"{path}.{attribute}".lstrip("."),
                    remedy="save the adapter, and do this with a model in one process that has loaded it",
                )
            if parameter is not None and parameter.ndim >= 2:
                readers = storages.setdefault(parameter.untyped_storage()._cdata, {})
                readers.setdefault(own, []).append((module, attribute))
    return [
        Storage(tuple(owners), own, len(readers) > 1)
        for readers in storages.values()
        for own, owners in readers.items()
        if own
    ]


def remember(module: nn.Module, key: str, value: Any) -> None:
    """Keep something of ours on a module. A GraphModule's copies only have what its meta names."""
    module.__dict__[key] = value
    if isinstance(module, fx.GraphModule):
        module.meta.setdefault(_PRESERVED, {})[key] = value


def forget(module: nn.Module, key: str) -> Any:
    if isinstance(module, fx.GraphModule) and key in module.meta.get(_PRESERVED, {}):
        del module.meta[_PRESERVED][key]
        if not module.meta[_PRESERVED]:
            del module.meta[_PRESERVED]
    return module.__dict__.pop(key, None)


def mark_reader(module: nn.Module) -> None:
    """This module's forward is to be rewritten as a graph."""
    remember(module, _READS, True)


def is_reader(module: nn.Module) -> bool:
    return _READS in module.__dict__


def unmark(module: nn.Module) -> None:
    forget(module, _READS)


def wire(model: nn.Module) -> dict[str, str]:
    """Give every module the class that its active adapters ask for.

    Returns:
        Marked modules that could not be rewritten as a graph after all, each with the reason.
    """
    unwire(model)
    _agree(model)
    owners = [(m, active) for m in model.modules() if (active := _active(m))]
    for module, active in owners:
        _swap(module, reads=_by_attribute(active))
    failed, graphs = {}, []
    for path, module in model.named_modules():
        if _is_rewritten(module) or _calls_rewritten(module):
            try:
                graphs.append((module, _graph_of(module)))
            except Untraceable as why:
                failed[path] = str(why)
    if failed:
        return failed
    for module, active in owners:
        graph = isinstance(module, fx.GraphModule)  # reads its own weights in its graph, however others read theirs
        _swap(module, reads=_by_attribute({c: a for c, a in active.items() if a.realised != "graph" and not graph}))
    for module, graph in graphs:
        _install(module, graph)
    keep_keys(model)
    return {}


def keep_keys(model: nn.Module) -> None:
    """A transformers model is saved under its own keys for as long as it has adapters.

    Otherwise `save_pretrained` renames, splits and merges by patterns over the keys. The factors' keys match them too,
    but factors cannot be split like their weight (rank 1 raises), and the Trainer, which does not convert them back,
    would resume with fresh factors. `from_pretrained` reads a model's own keys as well.
    """
    for module in model.modules():
        if not hasattr(module, "save_pretrained"):
            continue
        adapted = any(isinstance(child, Adapter) for child in module.modules())
        if adapted and _CONVERSIONS not in module.__dict__:
            module.__dict__[_CONVERSIONS] = module.__dict__.get("_weight_conversions")
            module.__dict__["_weight_conversions"] = []
        elif not adapted and _CONVERSIONS in module.__dict__:
            module.__dict__["_weight_conversions"] = module.__dict__.pop(_CONVERSIONS)  # None is transformers' default


def _agree(model: nn.Module) -> None:
    """All adapters of one weight are read in the same way, under whichever of its names."""
    by_storage: dict[int, list[Adapter]] = {}
    for _, owner, child, adapter in find_adapters(model):
        parameter = owner._parameters[attribute_of(child)]
        by_storage.setdefault(parameter.untyped_storage()._cdata, []).append(adapter)  # type: ignore[union-attr]
    for group in by_storage.values():
        if any(adapter.realised == "dispatch" for adapter in group):
            for adapter in group:
                adapter.realised = "dispatch"


def wire_or_dispatch(model: nn.Module) -> None:
    """`wire`, and where a marked module cannot be rewritten as a graph after all, every weight it reads dispatches."""
    while failed := wire(model):
        for path in failed:
            reader = model.get_submodule(path)
            for module in reader.modules() if isinstance(reader, fx.GraphModule) else [reader]:
                unmark(module)
            below = {id(p) for p in reader.parameters()}
            for _, owner, child, adapter in find_adapters(model):
                if id(owner._parameters[attribute_of(child)]) in below:
                    adapter.realised = "dispatch"


def unwire(model: nn.Module) -> None:
    """Give every module its original class and graph back; adapters stay where they are, and do nothing.

    Raises:
        LoraFxError: another tool has built on what would go.
    """
    refuse_displaced(model)
    _refuse_derived(model)
    for module in model.modules():
        spec = getattr(type(module), "_lora_fx", None)
        if spec is not None:
            module.__class__ = spec.base
        if _ORIGINAL in module.__dict__:
            module.graph = forget(module, _ORIGINAL)


@contextmanager
def unwired(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base model."""
    classes = [(m, type(m)) for m in model.modules()]
    graphs = [(m, m.graph, m.__dict__[_ORIGINAL]) for m in model.modules() if _ORIGINAL in m.__dict__]
    unwire(model)
    try:
        yield
    finally:
        for module, cls in classes:
            if type(module) is not cls:
                module.__class__ = cls
        for module, graph, original in graphs:
            module.graph = graph
            remember(module, _ORIGINAL, original)


def is_wired(model: nn.Module) -> bool:
    return any(hasattr(type(m), "_lora_fx") or _ORIGINAL in m.__dict__ for m in model.modules())


def _active(owner: nn.Module) -> dict[str, Adapter]:
    if isinstance(owner, Adapter):
        return {}
    return {child: a for child, a in adapters_of(owner).items() if a.active}


def _by_attribute(active: dict[str, Adapter]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    reads: dict[str, tuple[str, ...]] = {}
    for child in active:
        reads[attribute_of(child)] = (*reads.get(attribute_of(child), ()), child)
    return tuple(reads.items())


def _graph_of(module: nn.Module) -> fx.Graph:
    if isinstance(module, fx.GraphModule):
        return rewrite_graph(module, inlined=_is_inlined)
    return trace_forward(module)


def _is_rewritten(module: nn.Module) -> bool:
    """A reader with something to add: where no adapter is active the original forward stays."""
    return is_reader(module) and any(_active(below) for below in module.modules())


def _calls_rewritten(module: nn.Module) -> bool:
    """A GraphModule whose graph calls a module that is rewritten: its branches belong into that graph."""
    if not isinstance(module, fx.GraphModule):
        return False
    return any(n.op == "call_module" and _is_inlined(module.get_submodule(n.target)) for n in module.graph.nodes)


def _is_inlined(child: nn.Module) -> bool:
    """Hooks would be lost: a child with hooks stays a call, and is rewritten where it is."""
    return _is_rewritten(child) and not child._forward_hooks and not child._forward_pre_hooks


def _install(module: nn.Module, graph: fx.Graph) -> None:
    if isinstance(module, fx.GraphModule):
        remember(module, _ORIGINAL, module.graph)
        module.graph = graph
        return
    code = graph.python_code("self")
    spec = getattr(type(module), "_lora_fx", None)
    baked = baked_attributes(module)
    _swap(module, spec.reads if spec else (), code.src, _used_globals(code.src, code.globals), baked)


def _used_globals(source: str, scope: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The globals that the source names, so that a class can be made again from them; modules by their name."""
    words = set(re.findall(r"\w+", source))
    used = ((name, value) for name, value in sorted(scope.items()) if name in words)
    return tuple((name, f"{_IMPORT}{v.__name__}" if isinstance(v, ModuleType) else v) for name, v in used)


def _swap(
    module: nn.Module,
    reads: tuple[tuple[str, tuple[str, ...]], ...],
    source: str = "",
    names: tuple[tuple[str, Any], ...] = (),
    baked: frozenset[str] = frozenset(),
) -> None:
    spec = getattr(type(module), "_lora_fx", None)
    base = spec.base if spec else type(module)
    module.__class__ = generated_class(Spec(base, reads, source, names, baked)) if reads or source else base


@dataclass(frozen=True)
class Spec:
    """What a generated class is made from; equal specs share one class."""

    base: type
    reads: tuple[tuple[str, tuple[str, ...]], ...]
    """(attribute, adapter children) for each weight that reads as an `AdaptedWeight`."""
    source: str
    """The generated forward; empty where the base class's own runs."""
    names: tuple[tuple[str, Any], ...]
    """The globals of the generated forward."""
    baked: frozenset[str]
    """Attributes the generated forward has baked in: setting one gives the base forward back."""

    @property
    def key(self) -> tuple:
        names = tuple((name, value if isinstance(value, str) else id(value)) for name, value in self.names)
        return self.base, self.reads, self.source, names, self.baked

    def __deepcopy__(self, memo: dict) -> Spec:
        return self


_classes: WeakValueDictionary[tuple, type] = WeakValueDictionary()


def generated_class(spec: Spec) -> type:
    """The subclass of `spec.base`, one for equal specs."""
    known = _classes.get(spec.key)
    if known is not None:
        return known
    base = spec.base
    body: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body["_lora_fx"] = spec
    body["__reduce_ex__"] = _reduce
    for attribute, children in spec.reads:
        body[attribute] = _adapted_property(attribute, children)
    if spec.reads and issubclass(base, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, _set_flat_weights)
    if spec.source:
        body["forward"] = _forward(spec)
    if spec.baked:
        body["__setattr__"] = _guarded_setattr
    cls = type(base)(base.__name__, (base,), body)
    _classes[spec.key] = cls
    return cls


def is_generated(cls: type, inherited: bool = False) -> bool:
    """Whether the class is one of ours; or, inherited, was derived from one."""
    return hasattr(cls, "_lora_fx") if inherited else "_lora_fx" in vars(cls)


def _reduce(self: nn.Module, protocol: Any) -> tuple:
    """Copy and pickle by what the class was made from, since the class itself is found in no module."""
    plain = object.__reduce_ex__(self, max(int(protocol), 2))
    if not is_generated(type(self)):
        return plain
    _, _, *state = plain
    return _remake, (self._lora_fx,), *state


def _remake(spec: Spec) -> nn.Module:
    cls = generated_class(spec)
    return cls.__new__(cls)


def _guarded_setattr(self: nn.Module, name: str, value: Any) -> None:
    spec = type(self)._lora_fx
    if name in spec.baked and _differ(self.__dict__.get(name), value):
        if not is_generated(type(self)):
            raise LoraFxError(
                f"the generated forward has {name}={self.__dict__.get(name)!r} in it, and cannot be left for another: "
                f"since the module was adapted it has been given the class {type(self).__name__}",
                place=f"{type(self).__name__}.{name}",
                remedy=f"set {name} before",
            )
        # The generated forward assumes the old value; the base forward, which dispatches, reads the new one.
        own = _by_attribute(_active(self))
        self.__class__ = generated_class(Spec(spec.base, own, "", (), frozenset()))
    spec.base.__setattr__(self, name, value)  # the class may have become another's base, as in torch.export


def _differ(old: Any, new: Any) -> bool:
    """Whether a forward may tell these apart: tensors always, and 2 from 2.0."""
    return old is not new and (type(old) is not type(new) or (old == new) is not True)


def _adapted_property(attribute: str, children: tuple[str, ...]) -> property:
    def read(self: nn.Module) -> Any:
        return adapted_weight(self, attribute, children)

    def write(self: nn.Module, value: Any) -> None:
        self._parameters[attribute] = value  # a plain tensor: FSDP1 puts one there for as long as a forward lasts

    return property(read, write)


def adapted_weight(owner: nn.Module, attribute: str, children: tuple[str, ...]) -> Any:
    """`owner.<attribute>` with the branches of these adapters."""
    tracer = active_tracer()
    if tracer is not None:
        return tracer.read(owner, attribute, children)
    if attribute not in owner._parameters:  # FSDP1 takes the parameter away before it puts another one there
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {attribute!r}")
    parameter = owner._parameters[attribute]
    if parameter is None or is_shard(parameter):
        return parameter  # sharding code moves the parameter itself; it computes with the gathered one
    factors = []
    cast = False
    for child in children:
        adapter = getattr(owner, child)
        A, drop = adapter.A, adapter.dropout if adapter.dropout.p else None
        factors.append(Factors(adapter, A, adapter.B, drop, getattr(adapter, "index", None)))
        cast = cast or A.dtype != parameter.dtype
    return AdaptedWeight(parameter, View.of(parameter.shape), factors, parameter, (), cast)


def _flat_weights(self: nn.RNNBase) -> list[Any]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _set_flat_weights(self: nn.RNNBase, value: list[Any]) -> None:
    self.__dict__["_flat_weights"] = [self._parameters[name] for name in self._flat_weights_names]


def _is_import(value: Any) -> bool:
    """Other strings are annotations, which a file with postponed annotations keeps as text."""
    return isinstance(value, str) and value.startswith(_IMPORT)


def _forward(spec: Spec) -> Any:
    """Compile the generated forward so that tracebacks and debuggers show its source."""
    filename = f"<lora_fx {spec.base.__qualname__} {abs(hash((spec.source, spec.base))):x}>"
    scope: dict[str, Any] = {
        name: importlib.import_module(value.removeprefix(_IMPORT)) if _is_import(value) else value
        for name, value in spec.names
    }
    exec(spec.source, scope)
    source = _with_guard(spec.source, inspect.signature(scope["forward"]))
    scope["lora_fx_spec"] = spec
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)
    forward = scope["forward"]
    forward.__qualname__ = f"{spec.base.__qualname__}.forward"
    return forward


def _with_guard(source: str, signature: inspect.Signature) -> str:
    """Whoever wrapped this forward may keep it beyond its time: then the forward of today runs."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*{0}", inspect.Parameter.VAR_KEYWORD: "**{0}"}
    stars[inspect.Parameter.KEYWORD_ONLY] = "{0}={0}"
    passed = ", ".join(stars.get(p.kind, "{0}").format(p.name) for p in signature.parameters.values())
    guard = f"""
    if getattr(type(self), "_lora_fx", None) is not lora_fx_spec:
        return type(self).forward({passed})"""
    guarded, found = re.subn(r"^def forward\(.*:$", lambda line: line[0] + guard, source, count=1, flags=re.MULTILINE)
    assert found, source
    return guarded


def show(module: nn.Module) -> str:
    """The source of the forward that `module` runs: generated where it was rewritten, its own otherwise."""
    if isinstance(module, fx.GraphModule):
        return module.code.strip()
    spec = getattr(type(module), "_lora_fx", None)
    if spec is not None and spec.source:
        return spec.source.strip()
    reads = spec.reads if spec else ()
    notes = [f"# self.{attribute} reads with {', '.join(children)}" for attribute, children in reads]
    base = spec.base if spec else type(module)
    return "\n".join([*notes, textwrap.dedent(inspect.getsource(base.forward)).strip()])
