"""The base model as the reference of preference training: the same modules, with no adapter acting."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lora_fx.application import active
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import AdapterError, LoraFxError
from lora_fx.model.classes import own_class
from lora_fx.model.inventory import inventory


class Reference(nn.Module):
    """What a model is without its adapters, in eval mode. It has no parameters of its own: see `reference`."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.__dict__["_adapted"] = model  # no child: nobody moves, casts, counts or trains it here
        self._names = names
        self._taken = False
        self.eval()

    def __getattr__(self, name: str) -> Any:
        if "_adapted" not in self.__dict__:  # as while it is copied
            raise AttributeError(name)
        return getattr(self.__dict__["_adapted"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            raise LoraFxError(
                f"a {type(value).__name__} is set on it, and it has no modules and parameters of its own",
                place=f"the reference, {name}",
                remedy="set it on the model before; or load a second model as the reference, where the two must differ",
            )
        super().__setattr__(name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        model = self.__dict__["_adapted"]
        _refuse_unadapted(model)
        modes = [(module, module.training) for module in model.modules()]
        with active(model, *self._names):
            try:
                model.eval()
                return super().__call__(*arguments, **named)
            finally:
                for module, training in modes:
                    module.training = training

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.__dict__["_adapted"](*arguments, **named)

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of what it computes with, which whoever keeps something beside it knows it by; the model's own tensors."""
        model = self.__dict__["_adapted"]
        state = model.state_dict(*arguments, **named)
        start = named.get("prefix", "")
        adapters = {path: own for path, own in model.named_modules() if isinstance(own, Adapter)}
        left = tuple(f"{start}{path}." for path, own in adapters.items() if own.name not in self._names)
        return {key: tensor for key, tensor in state.items() if not key.startswith(left)}

    def __enter__(self) -> Reference:
        model = self.__dict__["_adapted"]
        _refuse_unadapted(model)
        if not getattr(model, "name_or_path", None) or not hasattr(type(model), "from_pretrained"):
            raise LoraFxError(
                f"{type(model).__name__} was not loaded by from_pretrained, so nobody can load it once more",
                place="the reference of a block",
                remedy="pass it: ref_model=lora_fx.reference(model); or load the model from a folder",
            )
        self._taken = False
        _Offers.of(own_class(model)).add(self)
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        model = self.__dict__["_adapted"]
        _Offers.of(own_class(model)).take_away(self)
        if kind is None and not self._taken:
            reason = f"nothing inside the block has loaded {model.name_or_path!r}: no reference was made"
            warnings.warn(reason, stacklevel=2)


def reference(model: nn.Module, *names: str) -> Reference:
    """The model without its adapters, as a model of its own that has no weights of its own.

        DPOTrainer(model, ref_model=lora_fx.reference(model), …)

        with lora_fx.reference(model):  # for a trainer that loads the reference by itself
            trainer = GRPOTrainer(model, reward, args=GRPOConfig(beta=0.04, …), …)

    Each call switches the adapters off, runs the model in eval mode, and switches them on again: the base, bit for bit
    as `disabled` gives it, in no memory. What is asked of it besides (a config, a head, a device) the model answers.
    What was trained beside the adapters is not the base's any more, and nothing switches it off.

    As a block: where code inside, in the same thread, loads the model from where the model has come
    (`from_pretrained(model.name_or_path)`), it gets this instead, and no second model is loaded. Options that ask for
    another model than this one (a dtype, an attention, a quantization) are refused. When nothing inside loads it, a
    warning says so.

    Args:
        names: adapters that do act in the reference, as one does that preference training goes on from.

    Raises:
        AdapterError: there is no adapter of a name.

    Raises, when it is called, or as a block:
        PlanError: the model is folded.
        LoraFxError: it has no adapter; a thread is inside a forward of the model; a block's model was not loaded.
    """
    known = inventory(model).names
    for name in names:
        if name not in known:
            raise AdapterError(f"there is no adapter {name!r}", place="the reference", remedy=f"there are {known}")
    return Reference(model, names)


def _refuse_unadapted(model: nn.Module) -> None:
    here = inventory(model)
    if not here.adapters and not here.folded:
        raise LoraFxError(
            f"{type(model).__name__} has no adapter, so its base is the model that trains",
            place="the reference",
            remedy="lora_fx.apply first; where the model itself is trained, load a second one as its reference",
        )


# ── instead of a second model ────────────────────────────────────────────────────────────────────────────────────────

_HOW = {"device_map", "trust_remote_code", "cache_dir", "local_files_only", "force_download", "token", "revision"} | {
    "use_safetensors", "weights_only", "low_cpu_mem_usage", "disable_mmap", "_commit_hash", "adapter_kwargs",
}  # fmt: skip
"""Options of `from_pretrained` that say how it loads, not what."""


class _Offers:
    """The references that `from_pretrained` of a class gives, each inside its block and thread, instead of loading."""

    _all: ClassVar[dict[type, _Offers]] = {}
    _lock = threading.Lock()

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.plain: Any = None
        self.standing: list[tuple[int, Reference]] = []

    @classmethod
    def of(cls, model_class: type) -> _Offers:
        owner = next(own for own in model_class.__mro__ if "from_pretrained" in own.__dict__)
        with cls._lock:
            return cls._all.setdefault(owner, cls(owner))

    def add(self, own: Reference) -> None:
        with self._lock:
            if not self.standing:
                self.plain = self.cls.__dict__["from_pretrained"]
                self.cls.from_pretrained = classmethod(self._loading)  # type: ignore[attr-defined]
            self.standing.append((threading.get_ident(), own))

    def take_away(self, own: Reference) -> None:
        with self._lock:
            self.standing.remove((threading.get_ident(), own))
            if not self.standing:
                self.cls.from_pretrained = self.plain  # type: ignore[attr-defined]

    def _loading(self, asked: Any, path: Any = None, *rest: Any, **options: Any) -> Any:
        for thread, own in reversed(self.standing):
            model = own.__dict__["_adapted"]
            same = str(path) == str(model.name_or_path) and issubclass(type(model), asked)
            if same and thread == threading.get_ident():
                _refuse_another(model, rest, options)
                own._taken = True
                return own
        return self.plain.__get__(None, asked)(path, *rest, **options)


def _refuse_another(model: Any, rest: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """What a second model is asked to be that this one is not."""
    config = model.config
    own = {
        "dtype": {None, "auto", model.dtype, str(model.dtype).removeprefix("torch.")},
        "attn_implementation": {None, config._attn_implementation},
    }
    own["torch_dtype"] = own["dtype"]
    for name, value in [*options.items(), *((f"argument {n + 2}", value) for n, value in enumerate(rest))]:
        if name in _HOW or value is None or (name == "config" and type(value) is type(config)):
            continue
        if name in own and value in own[name]:
            continue
        raise LoraFxError(
            f"{name}={value!r} asks for another model than the one that is adapted",
            place=f"from_pretrained({model.name_or_path!r}) inside the block of its reference",
            remedy="leave the option out; or load that model, and pass it as the reference",
        )
