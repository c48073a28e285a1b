"""Run a file: the base model or any adapter, chosen for each call.

ONNX Runtime has adapters of its own, and ignores them, with a log line or none, in bound and in asynchronous runs; of
two that overlap it takes the first; one that Python has freed gives the numbers of another. Here an adapter is nothing
but inputs: A and B of every slot are given in each call, in every kind of run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

from lora_fx.errors import ExportError
from lora_fx.export.onnx.loading import check_adapter, check_sealed
from lora_fx.export.onnx.portable import SUFFIX, read_factors
from lora_fx.export.onnx.runtimes import GPU, Provider, open_session, quiet_options, refuse, refusing, require
from lora_fx.export.onnx.switchable import MANIFEST, empty_slots, read_manifest
from lora_fx.export.onnx.tasks import GRAPH, read_task, read_weights

Adapters = str | Iterable[str] | None
"""The name of an adapter, or names of several that share no weight; None is the base model."""


class Session:
    """A file that `export_onnx` wrote, ready to run; with ``adapters="switchable"`` also any adapter of its base model.

    Args:
        path: the file.
        providers: as ONNX Runtime takes them: names, or (name, options). None takes TensorRT, CUDA and the CPU, those
            that load; on a build for GPUs it is an error where no GPU provider does.
        adapters: name → file of `save_onnx_adapter`, to begin with.
        shared: keep the weights where `task` can share them with further sessions. The runtime then makes no packed
            copies of its own, with which a session alone is faster.
        options: `onnxruntime.SessionOptions`.
        digest: of a file that another tool has changed since its export (quantised, optimised), or that is older than
            digests: the one it has now, see `onnx_digest`. Any other file must be as it was written, to the bit.

    Raises:
        ExportError: the file, a provider or an adapter does not load, or is not what was written.

    `session` is the `onnxruntime.InferenceSession`. Threads may share one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[Provider] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        shared: bool = False,
        options: Any = None,
        digest: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._asked, self._digest = providers, digest
        check_sealed(self.path, digest)
        self._weights = read_weights(self.path) if shared else {}
        self._guarded(options or quiet_options())
        if not isinstance(adapters, Mapping | None):
            refuse("adapters", f"{adapters!r} is no mapping", 'pass {"name": "file.onnx_adapter"}')
        for name, file in (adapters or {}).items():
            self.load_adapter(file, name)

    def __reduce__(self) -> NoReturn:
        remedy = "open the file in the other process, or once more in this one"
        refuse(str(self.path), "a session of ONNX Runtime is of one process, and is neither pickled nor copied", remedy)

    def _guarded(self, options: Any) -> None:
        with refusing("it is no file that export_onnx wrote", str(self.path), "export the model again"):
            self._open(options)

    def _open(self, options: Any) -> None:
        onnxruntime = require("onnxruntime")
        if self._weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
        # The runtime holds no reference to them: `_values` does, as long as the session lives.
        self._values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(array) for n, array in self._weights.items()}
        for name, value in self._values.items():
            options.add_initializer(name, value)
        self.session = open_session(str(self.path), self._asked, options)
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        metadata = self.session.get_modelmeta().custom_metadata_map
        self._manifest = read_manifest(metadata, str(self.path)) if MANIFEST in metadata else None
        self._slots: dict[str, Any] = self._manifest["inputs"] if self._manifest else {}
        self._check_slots()
        own = [value for value in self.session.get_inputs() if value.name not in self._slots]
        self.inputs = tuple(value.name for value in own)
        empty = empty_slots(self._manifest) if self._manifest else {}
        self._empty = {key: self._value(tensor.numpy()) for key, tensor in empty.items()}
        self._adapters: dict[str, dict[str, Any]] = {}
        self._running: dict[int, Any] = {}
        self._takes = ", ".join(f"{v.name}: {v.type} {v.shape}" for v in own)

    def _check_slots(self) -> None:
        """The graph has what its manifest says: it may have been written over by another tool."""
        values = [*self.session.get_overridable_initializers(), *self.session.get_inputs()]
        found = {value.name: value for value in values}
        for name, slot in self._slots.items():
            value = found.get(name)
            sizes = [0 if isinstance(size, str) else size for size in value.shape] if value else None
            kind = {"float32": "float", "float64": "double"}.get(slot["dtype"], slot["dtype"])
            if value is None or sizes != slot["shape"] or value.type != f"tensor({kind})":
                reason = f"the graph has no input {name!r} of {slot['dtype']} {slot['shape']}, which its manifest names"
                refuse(str(self.path), reason, "export the model again: another tool has changed the file")

    @property
    def providers(self) -> tuple[str, ...]:
        """Those that loaded, in the order in which they are asked to run a node."""
        return tuple(self.session.get_providers())

    @property
    def adapters(self) -> dict[str, tuple[str, ...]]:
        """The adapters that are loaded → the weights they adapt."""
        weights = {key: slot["weight"] for key, slot in self._slots.items()}
        return {name: tuple(sorted({weights[key] for key in own})) for name, own in self._adapters.items()}

    def task(self, weights: str | os.PathLike[str], options: Any = None) -> Session:
        """Another session of this graph, with a task's folded weights in the place of the base's: no node more, and no
        second copy of the weights that the task leaves alone.

        Args:
            weights: what `save_onnx_weights` wrote.

        Raises:
            ExportError: this session is not shared, or the weights are damaged, not finite, or for another graph.
        """
        if not self._weights:
            reason = "the session keeps no weights that another one could share"
            refuse(str(self.path), reason, "open it with Session(path, shared=True)")
        metadata = self.session.get_modelmeta().custom_metadata_map
        own = read_task(Path(weights), metadata.get(GRAPH, ""), self._weights)
        other = object.__new__(Session)
        other.path, other._asked, other._digest = self.path, self._asked, self._digest
        other._weights = {**self._weights, **own}
        check_sealed(self.path, self._digest)  # it is read anew
        other._guarded(options or quiet_options())
        return other

    def load_adapter(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Read an ``.onnx_adapter`` or ``.safetensors`` file, and check it against the graph's manifest.

        Returns:
            The name to run it by: `name`, or the file's own without its ending.

        Raises:
            ExportError: the file is damaged, or for another base model, graph, shape or dtype.
        """
        if not isinstance(path, str | os.PathLike):
            refuse("adapters", f"{path!r} is no path", 'pass {"name": "file.onnx_adapter"}')
        place, name = str(path), Path(path).stem if name is None else name
        if not isinstance(name, str) or not name:
            refuse("name", f"{name!r} is no name that a run could ask for", "give the adapter a word")
        factors, version = read_factors(Path(path)) if Path(path).suffix == SUFFIX else _read_adapter(place)
        base = (self._manifest or read_manifest({}, str(self.path)))["base"]
        if version != base:
            remedy = "save it with save_onnx_adapter from the model that was exported, its base weights unchanged"
            refuse(place, f"it is for base model {version}, the graph is of base model {base}", remedy)
        self._check_factors(factors, place)
        self._adapters[name] = {key: self._value(array) for key, array in factors.items()}
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Runs that use it now keep it until they end."""
        self._factors(name)
        del self._adapters[name]

    def _check_factors(self, factors: Mapping[str, numpy.ndarray], place: str) -> None:
        remedy = "save it with save_onnx_adapter from the model that was exported"
        ranks: dict[str, list[int]] = {}
        for key, array in sorted(factors.items()):
            slot = self._slots.get(key)
            if slot is None:
                refuse(place, f"the graph has no slot {key!r}", remedy)
            axis = slot["shape"].index(0)
            shape = [0 if n == axis else size for n, size in enumerate(array.shape)]
            if shape != slot["shape"] or str(array.dtype) != slot["dtype"]:
                takes = f"{slot['dtype']} {slot['shape']} of any size in the place of 0"
                reason = f"{key} is {array.dtype} {[*array.shape]}, the slot takes {takes}"
                refuse(place, reason, remedy)
            if not numpy.isfinite(array).all():
                refuse(place, f"{key} holds NaN or Inf", "save an earlier checkpoint")
            ranks.setdefault(slot["weight"], []).append(array.shape[axis])
        for weight, found in ranks.items():
            if len(found) != 2 or found[0] != found[1]:
                refuse(place, f"A and B of {weight} are of ranks {found}", remedy)

    def _factors(self, adapters: Adapters) -> dict[str, Any]:
        """A and B of every slot."""
        names = [adapters] if isinstance(adapters, str) else adapters
        if isinstance(names, Mapping):
            remedy = "activate(model, {name: strength}), and save that with save_onnx_adapter under a name of its own"
            refuse("adapter", f"{names!r} gives strengths, and a file is run at the strength it was saved with", remedy)
        if not isinstance(names, Iterable | None):
            refuse("adapter", f"{names!r} is no name", "pass the name of a loaded adapter, several, or None")
        names = [*(names or ())]
        found: dict[str, Any] = {}
        for name in names:
            if name not in self._adapters:
                remedy = f"load it first; loaded: {', '.join(self._adapters) or 'none'}"
                refuse(str(self.path), f"there is no adapter {name!r}", remedy)
            twice = found.keys() & self._adapters[name].keys()
            if twice:
                reason = f"{', '.join(map(repr, names))} both adapt {self._slots[min(twice)]['weight']}"
                refuse("adapter", reason, "run one of them, or save their sum as one adapter")
            found |= self._adapters[name]
        return {**self._empty, **found}

    def run(self, inputs: Any, adapter: Adapters = None, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run the model with these adapters.

        Args:
            inputs: by name; or one after the other; numpy arrays, or torch tensors, which stay on their device.
            adapter: the name of a loaded adapter, or several that share no weight; None runs the base model.
            outputs: names; None for all.

        Returns:
            name → array, or tensor where torch tensors were given.
        """
        fed, names = self._fed(inputs), self._wanted(outputs)
        factors = self._factors(adapter)
        if any(isinstance(value, torch.Tensor) for value in fed.values()):
            return self._run_tensors(fed, factors, names)
        with refusing("", str(self.path), f"the model takes {self._takes}"):
            values = {name: self._value(array, host=True) for name, array in fed.items()} | factors
            found = self.session.run_with_ort_values(names, values)
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}

    def run_async(
        self, inputs: Any, adapter: Adapters = None, outputs: Sequence[str] | None = None
    ) -> Future[dict[str, Any]]:
        """`run` in a thread of ONNX Runtime's; on arrays. Its session needs two intra-op threads or more."""
        fed, names, future = self._fed(inputs), self._wanted(outputs), Future[dict[str, Any]]()
        factors = self._factors(adapter)
        arrays = {name: v.detach().cpu() if isinstance(v, torch.Tensor) else v for name, v in fed.items()}
        feeds = {name: numpy.ascontiguousarray(array) for name, array in arrays.items()}
        feeds |= {name: value.numpy() for name, value in factors.items()}

        def done(results: Any, kept: Any, error: str) -> None:
            self._running.pop(id(future))
            if error:
                future.set_exception(ExportError(error, place=str(self.path), remedy="run it with run: that says more"))
            else:
                future.set_result(dict(zip(names, results, strict=True)))

        # The runtime reads these while it runs, and keeps none of them alive.
        self._running[id(future)] = future, feeds, factors
        self.session.run_async(names, feeds, done, None)
        return future

    def bind_adapter(self, binding: Any, adapter: Adapters = None) -> None:
        """Bind A and B of every slot in an `onnxruntime.IOBinding`, which an adapter of the runtime's own does not
        reach. Then ``session.run_with_iobinding(binding)`` runs with it, and the next call of this one changes it."""
        for name, value in self._factors(adapter).items():
            binding.bind_ortvalue_input(name, value)

    def _run_tensors(
        self, fed: Mapping[str, Any], factors: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        onnxruntime = require("onnxruntime")
        binding = self.session.io_binding()
        with refusing("", str(self.path), f"the model takes {self._takes}"):
            tensors = {name: torch.as_tensor(value).detach().contiguous() for name, value in fed.items()}
            values = {name: onnxruntime.OrtValue.from_dlpack(tensor) for name, tensor in tensors.items()}
        for name, value in {**values, **factors}.items():
            binding.bind_ortvalue_input(name, value)
        device = next(iter(tensors.values())).device
        for name in names:
            binding.bind_output(name, device.type, device.index or 0)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # what the inputs are computed by
        with refusing("", str(self.path), f"the model takes {self._takes}"):
            binding.synchronize_inputs()
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        return {name: torch.from_dlpack(v) for name, v in zip(names, binding.get_outputs(), strict=True)}

    def _fed(self, inputs: Any) -> dict[str, Any]:
        takes = f"the model takes {', '.join(self.inputs)}"
        if not isinstance(inputs, Mapping):
            inputs = inputs if isinstance(inputs, tuple | list) else [inputs]
            if len(inputs) > len(self.inputs):
                refuse("inputs", f"{len(inputs)} inputs were given", takes)
            inputs = dict(zip(self.inputs, inputs, strict=False))
        for name in inputs:
            if name in self._slots:
                remedy = "load_adapter, and run with its name"
                refuse("inputs", f"{name!r} is a slot for an adapter", remedy)
            if name not in self.inputs:
                refuse("inputs", f"{name!r} is no input", takes)
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            refuse("inputs", f"{', '.join(missing)} is missing", takes)
        return dict(inputs)

    def _wanted(self, outputs: Sequence[str] | None) -> list[str]:
        names = [*(self.outputs if outputs is None else outputs)]
        for name in names:
            if name not in self.outputs:
                remedy = f"the model returns {', '.join(self.outputs)}"
                refuse("outputs", f"{name!r} is no output", remedy)
        return names

    def _value(self, array: Any, host: bool = False) -> Any:
        """An array as the runtime's own value, on the device that computes with it."""
        device = "cpu", 0
        if not host and (first := self.providers[0]) in GPU:
            device = "cuda", int(self.session.get_provider_options()[first].get("device_id", 0))
        return require("onnxruntime").OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(array), *device)


def _read_adapter(place: str) -> tuple[dict[str, numpy.ndarray], int]:
    """A and B by name, and the version of their base model, in a file of ONNX Runtime's own format."""
    adapters = require("onnxruntime").AdapterFormat
    reason, remedy = "it is no adapter file that ONNX Runtime can read", "pass a file that save_onnx_adapter wrote"
    with refusing(reason, place, remedy):
        check_adapter(Path(place), remedy)
        file = adapters.read_adapter(place)
        # A copy: the values lie in the file's own memory.
        factors = {key: value.numpy().copy() for key, value in file.get_parameters().items()}
    return factors, file.get_model_version()
