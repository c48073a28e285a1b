"""The classes that adapted modules have: generated, each a subclass of the module's own.

* with a forward of its own, generated from the traced graph with the branches in it (`Realisation.GRAPH`);
* with a property in the place of the parameter, which reads as an `AdaptedWeight` (`Realisation.DISPATCH`). Whoever
  reads the weight gets the branches: another module, a fused kernel's Python front, an LSTM;
* or which reads as W + δ (`Realisation.DENSE`), for whoever wants a plain tensor: a kernel, an autograd function.

Modules whose generated code is the same share one class, so `torch.compile` compiles it once. The subclass names what
it was made from, so instances can be copied and pickled.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import linecache
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType, ModuleType
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.compiler import is_dynamo_compiling

from lora_fx.deltas.adapted_weight import AdaptedWeight, Branch
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.compiled_schedules import ORDINARY
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import LoraFxError
from lora_fx.graph.dynamo import inlined, reverse_matmul
from lora_fx.graph.places import is_moved, is_shard, refuse_shard
from lora_fx.graph.views import View
from lora_fx.model.behind import around, behind
from lora_fx.model.inventory import Inventory, inventory
from lora_fx.model.marks import ORIGINAL, attribute_of, forget, remember
from lora_fx.walking import modules_of

_IMPORT = "import "
_FREES = re.compile(r";  [\w =]+ = None$", re.MULTILINE)  # how generated code lets go of what it does not read again

Reads = tuple[tuple[str, tuple[str, ...], bool], ...]
"""(attribute, adapter children, whether as W + δ) for each weight that reads as more than it holds."""


def reads_of(adapters: Mapping[str, Adapter]) -> Reads:
    """What a module reads, from its adapters by child name."""
    if not adapters:
        return ()
    reads: dict[str, tuple[str, ...]] = {}
    for child in adapters:
        reads[attribute_of(child)] = (*reads.get(attribute_of(child), ()), child)
    dense = {attribute_of(child) for child, a in adapters.items() if a.realised == Realisation.DENSE}
    return tuple((attribute, children, attribute in dense) for attribute, children in reads.items())


def spec_of(module: nn.Module) -> Spec | None:
    """What the module's class was made from, or the class that another tool's was derived from; None for its own."""
    return getattr(type(module), "_lora_fx", None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what we have made of it."""
    spec = spec_of(module)
    return spec.base if spec else type(module)


def is_generated(cls: type) -> bool:
    """Whether the class is one of ours, and not another tool's that was derived from one."""
    return "_lora_fx" in vars(cls)


def give_class(module: nn.Module, reads: Reads = ()) -> None:
    """The class in which the module reads these weights with their branches; its own for none."""
    base = own_class(module)
    cls = generated_class(Spec(base, reads)) if reads else base
    if type(module) is not cls:
        module.__class__ = cls


def give_forward(module: nn.Module, graph: fx.Graph, baked: frozenset[str], fallback: Reads) -> None:
    """The class with this graph as its forward, beside what the module reads already.

    Args:
        baked: attributes whose values are in the graph: setting one gives the base forward back, which then reads
        fallback: these weights with their branches.
    """
    if isinstance(module, fx.GraphModule):
        remember(module, ORIGINAL, module.graph)
        module.graph = graph
        return
    code = graph.python_code("self")
    spec = spec_of(module)
    base, reads = (spec.base, spec.reads) if spec else (type(module), ())
    names = _used_globals(code.src, code.globals)
    module.__class__ = generated_class(Spec(base, reads, code.src, names, baked, fallback))


def wrap(module: nn.Module) -> None:
    """The class that it has, with what stands around its forward."""
    spec = spec_of(module) or Spec(type(module), ())
    module.__class__ = generated_class(replace(spec, wrapped=True))


def _refuse_derived(here: Inventory) -> None:
    """Raise where another tool has derived a class from a generated one (a parametrization, `fully_shard`): with the
    generated class that one would go."""
    for module, (path, *_) in here.modules.items():
        if spec_of(module) is not None and not is_generated(type(module)):
            raise LoraFxError(
                f"since the module was adapted it has been given the class {type(module).__name__}, and would lose it",
                place=path or "the model",
                remedy="change the adapters before that, or undo it (torch.nn.utils.parametrize."
                "remove_parametrizations) and do it again",
            )


def unwire(model: nn.Module, here: Inventory | None = None) -> None:
    """Give every module its original class and graph back; adapters stay where they are, and do nothing.

    Args:
        here: the model's inventory, where it has been taken.

    Raises:
        LoraFxError: another tool has built on what would go.
    """
    here = here or inventory(model)  # refuses displaced weights
    _refuse_derived(here)
    for module in here.modules:
        spec = spec_of(module)
        if spec is not None:
            module.__class__ = spec.base
        if ORIGINAL in module.__dict__:
            module.graph = forget(module, ORIGINAL)


@contextmanager
def unwired(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base model."""
    classes = [(m, type(m)) for m in model.modules()]
    graphs = [(m, m.graph, m.__dict__[ORIGINAL]) for m in model.modules() if ORIGINAL in m.__dict__]
    unwire(model)
    try:
        yield
    finally:
        for module, cls in classes:
            if type(module) is not cls:
                module.__class__ = cls
        for module, graph, original in graphs:
            module.graph = graph
            remember(module, ORIGINAL, original)


def is_wired(model: nn.Module) -> bool:
    """Whether a module has a class or a graph of ours."""
    return any(spec_of(m) is not None or ORIGINAL in m.__dict__ for m in modules_of(model))


def show(module: nn.Module) -> str:
    """The source of the forward that `module` runs: generated where it was rewritten, its own otherwise."""
    if isinstance(module, fx.GraphModule):
        return _FREES.sub("", module.code.strip())
    spec = spec_of(module)
    if spec is not None and spec.source:
        return _FREES.sub("", spec.source.strip())
    reads = spec.reads if spec else ()
    notes = [f"# self.{read} {'is the sum' if dense else 'reads'} with {', '.join(own)}" for read, own, dense in reads]
    notes += [f"# behind it {one.tensor} of {one.adapter.name}" for one in behind(module) if one.adapter.active]
    base = own_class(module)
    try:
        source = textwrap.dedent(inspect.getsource(base.forward)).strip()
    except (OSError, TypeError):  # made by exec, or in C
        source = f"# {base.__name__}.forward, whose source is not at hand"
    return "\n".join([*notes, source])


# ── generated classes ─────────────────────────────────────────────────────────────────────────────────────────────────


def _used_globals(source: str, scope: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The globals that the source names, so that a class can be made again from them; modules by their name."""
    words = set(re.findall(r"\w+", source))
    used = ((name, value) for name, value in sorted(scope.items()) if name in words)
    return tuple((name, f"{_IMPORT}{v.__name__}" if isinstance(v, ModuleType) else v) for name, v in used)


@dataclass(frozen=True)
class Spec:
    """What a generated class is made from; equal specs share one class."""

    base: type[nn.Module]
    reads: Reads
    source: str = ""
    """The generated forward; empty where the base class's own runs."""
    names: tuple[tuple[str, Any], ...] = ()
    """The globals of the generated forward."""
    baked: frozenset[str] = frozenset()
    """Attributes the generated forward has baked in: setting one gives the base forward back."""
    fallback: Reads = ()
    """What is read then."""
    wrapped: bool = False
    """Something stands around its forward (`lora_fx.model.behind`)."""

    @property
    def key(self) -> tuple[Any, ...]:
        names = tuple((name, value if isinstance(value, str) else id(value)) for name, value in self.names)
        return self.base, self.reads, self.source, names, self.baked, self.fallback, self.wrapped

    def __deepcopy__(self, memo: dict) -> Spec:
        return self


_classes: WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = WeakValueDictionary()


def generated_class(spec: Spec) -> type[nn.Module]:
    """The subclass of `spec.base`, one for equal specs."""
    known = _classes.get(spec.key)
    if known is not None:
        return known
    base = spec.base
    body: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body["_lora_fx"] = spec
    body[READER] = None
    body["__reduce_ex__"] = _reduce
    for attribute, children, dense in spec.reads:
        body[attribute] = _adapted_property(attribute, children, dense)
    if spec.reads and issubclass(base, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, _set_flat_weights)
    body["register_parameter"] = _register_parameter
    if spec.source:
        body["forward"] = _forward(spec)
        body["__setattr__"], body["__delattr__"] = _guarded_setattr, _guarded_delattr
    if spec.wrapped:
        body["forward"] = around(body.get("forward", base.forward), spec)
    cls: type[nn.Module] = _metaclass(base)(base.__name__, (base,), body)
    _classes[spec.key] = cls
    return cls


def _metaclass(base: type[nn.Module]) -> Any:
    """The base's own; or, where code of the base may set attributes of ``type(self)``, one that sets them there."""
    plain: Any = type(base)
    users = (kind for kind in base.__mro__ if not kind.__module__.startswith("torch."))
    functions = (f for kind in users for f in vars(kind).values() if inspect.isfunction(f))
    if not any(_may_set_class_attributes(function.__code__) for function in functions):
        return plain
    methods = {"__setattr__": _set_on_base, "__delattr__": _delete_on_base}
    return type(plain.__name__, (plain,), methods)


def _may_set_class_attributes(code: CodeType) -> bool:
    named = {"type", "__class__"} & {*code.co_names, *code.co_freevars}
    sets = named and any(step.opname in ("STORE_ATTR", "DELETE_ATTR") for step in dis.get_instructions(code))
    return bool(sets) or any(_may_set_class_attributes(own) for own in code.co_consts if isinstance(own, CodeType))


def _set_on_base(cls: type, name: str, value: Any) -> None:
    base = _base_for(cls, name)
    setattr(base, name, value) if base else type.__setattr__(cls, name, value)


def _delete_on_base(cls: type, name: str) -> None:
    base = _base_for(cls, name)
    delattr(base, name) if base else type.__delattr__(cls, name)


def _base_for(cls: type, name: str) -> type | None:
    """None for what Python sets of each class, for a class that another tool has derived, and for one that is being
    made: what `__init_subclass__` sets is for that one."""
    spec: Spec | None = vars(cls).get("_lora_fx")
    if spec is None or name.startswith(("__", "_abc_")) or _classes.get(spec.key) is not cls:
        return None
    return spec.base


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Copy and pickle by what the class was made from, since the class itself is found in no module."""
    plain: Any = object.__reduce_ex__(self, max(int(protocol), 2))
    if not is_generated(type(self)):
        return plain
    _, _, *state = plain
    return _remake, (self._lora_fx,), *state


def _remake(spec: Spec) -> nn.Module:
    cls = generated_class(spec)
    return nn.Module.__new__(cls)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    spec = spec_of(self)
    assert spec is not None, "only generated classes have this method"
    refuse_shard(self, name, param)
    spec.base.register_parameter(self, name, param)


def _guarded_setattr(self: nn.Module, name: str, value: Any) -> None:
    spec = _leave_for(self, name, value)
    spec.base.__setattr__(self, name, value)  # the class may have become another's base, as in torch.export


def _guarded_delattr(self: nn.Module, name: str) -> None:
    spec = _leave_for(self, name, _differ)  # differs from all that was there
    spec.base.__delattr__(self, name)


def _leave_for(self: nn.Module, name: str, value: Any) -> Spec:
    """The module's spec, when an attribute is set: a generated forward that has another value in it goes."""
    spec = spec_of(self)
    assert spec is not None, "only generated classes have this method"
    if (name in spec.baked or name == "forward") and _differ(self.__dict__.get(name), value):
        if not is_generated(type(self)):
            raise LoraFxError(
                f"the generated forward has {name}={self.__dict__.get(name)!r} in it, and cannot be left for another: "
                f"since the module was adapted it has been given the class {type(self).__name__}",
                place=f"{type(self).__name__}.{name}",
                remedy=f"set {name} before",
            )
        # The generated forward assumes the old value; the base forward, which dispatches, reads the new one.
        self.__class__ = generated_class(Spec(spec.base, spec.fallback, wrapped=spec.wrapped))
    return spec


def _differ(old: Any, new: Any) -> bool:
    """Whether a forward may tell these apart: tensors always, and 2 from 2.0."""
    return old is not new and (type(old) is not type(new) or (old == new) is not True)


def _adapted_property(attribute: str, children: tuple[str, ...], dense: bool) -> property:
    @inlined
    def read_sum(self: nn.Module) -> Any:
        adapted = adapted_weight(self, attribute, children)
        return adapted.dense() if isinstance(adapted, AdaptedWeight) and self._lora_fx_reader is None else adapted

    @inlined
    def read(self: nn.Module) -> Any:
        parameter: Any = self._parameters.get(attribute)
        plain = type(parameter) in ORDINARY and parameter.dim() > 1
        if not plain or self._lora_fx_reader is not None or is_dynamo_compiling():
            return adapted_weight(self, attribute, children)
        if is_moved(self, 1):
            return parameter
        own: Any = self._modules  # an adapter of a tied weight is a child of one of its owners
        if len(children) == 1:
            return AdaptedWeight.read(parameter, (own.get(children[0]) or getattr(self, children[0]),))
        return AdaptedWeight.read(parameter, tuple([own.get(child) or getattr(self, child) for child in children]))

    def write(self: nn.Module, value: Any) -> None:
        self._parameters[attribute] = value  # a plain tensor: FSDP1 puts one there for as long as a forward lasts

    return property(read_sum if dense else read, write)


class Tracer(Protocol):
    """What reads adapted weights while a module is rewritten."""

    def read(self, owner: nn.Module, attribute: str, children: tuple[str, ...]) -> Any: ...


@dataclass
class Reader:
    """Through which tracer the weights of a model read just now; none outside of a trace."""

    tracer: Tracer | None = None

    @contextmanager
    def by(self, tracer: Tracer) -> Iterator[None]:
        before, self.tracer = self.tracer, tracer
        try:
            yield
        finally:
            self.tracer = before


READER = "_lora_fx_reader"
"""The attribute that a module has its `Reader` in, for as long as the model is rewritten."""


def adapted_weight(owner: nn.Module, attribute: str, children: tuple[str, ...]) -> Any:
    """`owner.<attribute>` with the branches of these adapters."""
    reader: Reader | None = getattr(owner, READER)  # None in the class
    if reader is not None and reader.tracer is not None:
        return reader.tracer.read(owner, attribute, children)
    if attribute not in owner._parameters:  # FSDP1 takes the parameter away before it puts another one there
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {attribute!r}")
    parameter = owner._parameters[attribute]
    if parameter is None or is_shard(parameter) or is_moved(owner, 2):
        return parameter  # code that shards or loads moves the parameter itself; forwards compute with what it makes
    if is_dynamo_compiling():
        reverse_matmul()
    adapters = [getattr(owner, child) for child in children]
    branches = [Branch(a, a.value(), a.dropout if a.drops else None) for a in adapters]
    cast = any(a.dtype != parameter.dtype for a in adapters)
    adapted = AdaptedWeight(parameter, View.of(parameter.shape), branches, parameter, (), cast)
    return adapted if parameter.ndim > 1 else adapted.dense()  # nothing multiplies with a bias


@inlined
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
    source = _reading_once(_with_guard(spec.source, inspect.signature(scope["forward"])))
    scope["lora_fx_spec"] = spec
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)
    forward = scope["forward"]
    forward.__qualname__ = f"{spec.base.__qualname__}.forward"
    return forward


_OF_CHILD = re.compile(r"^( +)(\w+ = )self\.(\w+)\.(?=\w+(?:;|$))", re.MULTILINE)


def _reading_once(source: str) -> str:
    """Each child that several lines read from is looked up once: the lookup is a search in Python, of half a µs."""
    often = Counter(child for _, _, child in _OF_CHILD.findall(source))
    held: set[str] = set()

    def read(line: re.Match[str]) -> str:
        indent, start, child = line.groups()
        name = f"lora_fx_{child}"
        if often[child] == 1 or name in source:
            return line[0]
        first = "" if name in held else f"{indent}{name} = self.{child}\n"
        held.add(name)
        return f"{first}{indent}{start}{name}."

    return _OF_CHILD.sub(read, source)


def _with_guard(source: str, signature: inspect.Signature) -> str:
    """Whoever wrapped this forward may keep it beyond its time: then the forward of today runs."""
    kinds = inspect.Parameter
    stars: dict[Any, str] = {kinds.VAR_POSITIONAL: "*{0}", kinds.VAR_KEYWORD: "**{0}", kinds.KEYWORD_ONLY: "{0}={0}"}
    passed = ", ".join(stars.get(p.kind, "{0}").format(p.name) for p in signature.parameters.values())
    guard = f"""
    if getattr(type(self), "_lora_fx", None) is not lora_fx_spec:
        return type(self).forward({passed})"""
    guarded, found = re.subn(r"^def forward\(.*:$", lambda line: line[0] + guard, source, count=1, flags=re.MULTILINE)
    assert found, source
    return guarded
