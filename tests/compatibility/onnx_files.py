"""ONNX files of a model, each held against plain torch.

    folded       opset 20, 23    proven                                 ≡  the model with W + s·B·A in its weights
    switchable   opset 20, 23    every slot fed, every second, none     ≡  the same, with what is fed

They are run in ONNX Runtime as anyone would: by a session of its own, with A and B fed by name. The oracle is that of
`checking`. Where an export is refused, torch's own exporter is given the base, with the same settings: what it cannot
do either is no fault of ours, and the axes that it cannot make dynamic are tried fixed.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Adapter
from lora_fx.checks.verification import as_real, cast_inputs, compare, relative_error
from lora_fx.export.onnx.calls import Call, resized, tensors_in
from lora_fx.graph.capture import Inputs, no_fast_paths
from lora_fx.model.inventory import inventory
from tests.compatibility import Model, checking
from tests.compatibility.checking import SCALE, Different, Life, Oracle, Row, Wrong

OPSETS = (20, 23)
FORMS = ("folded", "switchable")

#: family → package → models
FAMILIES: dict[str, dict[str, str]] = {
    "own nets": {
        "zoo": "native-decoder native-einsum-attention native-bilinear native-conv3d native-deconv native-experts"
        " native-parameter-list native-sliced-attention native-mha-kdim native-sliced-gate native-shared-parameter",
        "x_transformers": "alibi XTransformer",
    },
    "vision": {
        "transformers": "poolformer regnet mobilenet_v2 convnextv2 dinov3_vit pvt cvt beit swinv2 hiera",
        "vit_pytorch": "cait cct",
        "timm": "efficientnet_b0 xcit_nano_12_p16_224",
    },
    "diffusion": {
        "diffusers": "AutoencoderKL UNet2DModel DiTTransformer2DModel SanaTransformer2DModel FluxTransformer2DModel"
        " WanTransformer3DModel SD3Transformer2DModel ControlNetModel UNet2DConditionModel",
    },
    "series and graphs": {
        "torch_geometric": "GCNConv GATv2Conv GraphSAGE RGCNConv GIN TransformerConv GAT EdgeCNN",
        "transformers": "patchtst patchtsmixer",
    },
    "detection, segmentation, depth": {
        "transformers": "glpn eomt owlvit owlv2 clipseg maskformer rf_detr grounding-dino yolos",
    },
    "speech": {
        "zoo": "whisper",
        "transformers": "audio-spectrogram-transformer wavlm parakeet_ctc data2vec-audio hubert qwen2_audio_encoder",
    },
    "encoders": {"transformers": "big_bird fnet roformer canine nystromformer deberta layoutlmv3 funnel"},
    "decoders": {"transformers": "exaone4 openai-gpt olmo3 xglm granite smollm3", "zoo": "falcon bloom"},
    "mixtures of experts": {
        "zoo": "mixtral-eager",
        "transformers": "granitemoe phimoe switch_transformers jetmoe glm4_moe hunyuan_v1_moe",
    },
    "dual encoders": {"open_clip": "CLIP CoCa", "transformers": "siglip altclip metaclip_2 chinese_clip blip"},
    "encoder-decoders": {"transformers": "mt5 bigbird_pegasus mbart pegasus t5gemma m2m_100 plbart prophetnet"},
    "state space and recurrence": {
        "zoo": "native-lstm mamba",
        "transformers": "falcon_mamba lfm2 rwkv mamba2 recurrent_gemma qwen3_next jamba xlstm",
    },
    "vision and language": {"transformers": "llava paligemma idefics3"},
}  # fmt: skip

#: input → its axes beside the first that change
AXES: Mapping[str, Mapping[int, str]] = {
    "input_ids": {1: "tokens"},
    "attention_mask": {1: "tokens"},
    "token_type_ids": {1: "tokens"},
    "position_ids": {1: "tokens"},
    "decoder_input_ids": {1: "targets"},
}
GRAPH = {"x": {0: "nodes"}, "edge_index": {1: "edges"}}
LEVELS = ("batch and length", "batch", "fixed")
"""Which axes are dynamic: each is tried where torch cannot export the one before it."""
GROWN = {"batch": 1, "tokens": 2, "targets": 3, "nodes": 2, "edges": 3}
"""Axis → how much longer it is in the other shape."""


def family(package: str, name: str) -> str:
    """The family that a model stands for; empty where it stands for none."""
    found = (key for key, packages in FAMILIES.items() if name in packages.get(package, "").split())
    return next(found, "")


def of_families(models: Iterable[Model]) -> list[Model]:
    """Those that stand for a family, in turns: what a run that ends early has done is of every family."""
    found = {(model.package, model.name): model for model in models}
    own = [[(p, n) for p, names in each.items() for n in names.split()] for each in FAMILIES.values()]
    return [found[key] for turn in itertools.zip_longest(*own) for key in turn if key in found]


@dataclass
class FilesRow(Row):
    """What came of one model's files."""

    files: dict[str, str] = field(default_factory=dict)
    """File → which of its axes are dynamic: each was right on all inputs."""
    theirs: list[str] = field(default_factory=list)
    """What torch's own exporter, or ONNX Runtime with its file, does not do with the base either."""

    @property
    def verdict(self) -> str:
        found = super().verdict
        return "torch refuses" if found == "right" and not self.files else found


def check(model: Model) -> FilesRow:
    """Build the model, adapt all of it, export it in each form, and compare each file."""
    row = FilesRow(model.package, model.name)
    return checking.check(replace(model, make=partial(_exportable, model.make)), row, FilesLife)


def _exportable(make: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    """The model, with its experts side by side: torch exports no loop over those that were chosen."""
    model, inputs = make()
    if hasattr(model, "set_experts_implementation"):
        with suppress(ValueError):  # it has none
            model.set_experts_implementation("batched_mm")
    return model, inputs


class FilesLife(Life):
    """The steps of one model."""

    def live(self) -> None:
        with no_fast_paths():
            if not self._apply():
                return
            self.row.notes.clear()  # of what apply left out, which the other table tells
            checking.fill(self.model, 0)
            for opset in OPSETS:
                for form in FORMS:
                    self._file(form, opset)

    def _file(self, form: str, opset: int) -> None:
        """The file with as many dynamic axes as torch can do."""
        for level in LEVELS:
            axes = axes_of(self.inputs[0], level)
            if level != LEVELS[-1] and (not axes or axes == axes_of(self.inputs[0], _next(level))):
                continue
            refused = len(self.row.refused)
            with self._step(f"{form}, opset {opset}, {level}"):
                self._export(form, opset, axes)
                self.row.files[f"{form} {opset}"] = level
                return
            if len(self.row.refused) == refused:
                return
            if theirs := plain_fails(self.base, self.inputs[0], opset, axes):
                self.row.refused.pop()
                self.row.theirs.append(f"{form}, opset {opset}, {level}: {theirs}")

    def _export(self, form: str, opset: int, axes: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "m.onnx"
            shapes = shapes_of(self.inputs[0], axes)
            given = {"dynamic_shapes": shapes, "opset": opset, "adapters": form, "prove": form == "folded"}
            given["check"] = opset == OPSETS[0]  # what is looked at here is beyond it
            lora_fx.export_onnx(self.model, self.inputs[0], file, **given)
            session = opened(file)
            other = grown(self.inputs[0], axes)
            many = [self.inputs[0], self.inputs[1], *([other] if axes else [])]
            slots = [value.name for value in session.get_overridable_initializers()]
            adapters = list(dict.fromkeys(place.adapter for place in inventory(self.model).places))
            for chosen in (adapters, adapters[::2], []) if slots else (adapters,):
                with only(self.model, chosen):
                    oracle = Oracle(self.base, self.model)
                    feeds = self._factors(slots, chosen)
                    where = f"{len(feeds)} of {len(slots)} slots fed, " if slots else ""
                    for inputs in many:
                        compare_file(session, inputs, oracle, self.model, feeds, where)

    def _factors(self, slots: Iterable[str], chosen: Sequence[Adapter]) -> dict[str, torch.Tensor]:
        """A and B of the slots that they have: side by side those of all adapters of a weight."""
        found: dict[str, torch.Tensor] = {}
        for weight in {slot.rpartition(".lora_")[0] for slot in slots}:
            acting = {place.adapter: None for place in inventory(self.model).places if weight in place.weights}
            own = [checking.factors(adapter) for adapter in acting if adapter in chosen]
            if own:
                found[f"{weight}.lora_A"] = torch.cat([a for a, _ in own], -2).float()
                found[f"{weight}.lora_B"] = torch.cat([SCALE * b for _, b in own], -1).float()
        return found


def _next(level: str) -> str:
    return LEVELS[LEVELS.index(level) + 1]


@contextmanager
def only(model: nn.Module, chosen: Sequence[Adapter]) -> Iterator[None]:
    """Inside, all other adapters are zero."""
    others = [place.adapter for place in inventory(model).places if place.adapter not in chosen]
    before = {adapter: adapter.B.detach().clone() for adapter in others}
    with torch.no_grad():
        for adapter in before:
            adapter.B.zero_()
        try:
            yield
        finally:
            for adapter, numbers in before.items():
                adapter.B.copy_(numbers)


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def axes_of(inputs: Inputs, level: str) -> dict[str, Any]:
    """Dynamic axes, of keyword inputs by name, of positional ones by place."""
    if level == "fixed":
        return {}
    named: dict[Any, Any] = {**dict(enumerate(inputs.args)), **inputs.kwargs}
    tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor) and value.ndim}
    if "edge_index" in tensors:
        return {key: axes for key, axes in GRAPH.items() if level == LEVELS[0]}
    sizes = [tensor.shape[0] for tensor in tensors.values()]
    batch = max(set(sizes), key=sizes.count) if sizes else 0
    found = {}
    for key, tensor in tensors.items():
        axes = {0: "batch"} if tensor.shape[0] == batch else {}
        long = AXES.get(key, {}) if level == LEVELS[0] and tensor.ndim == 2 else {}
        found[key] = axes | dict(long)
    return {key: axes for key, axes in found.items() if axes}


def shapes_of(inputs: Inputs, axes: Mapping[Any, Any]) -> Any:
    """The axes as `export_onnx` wants them."""
    if not axes:
        return None
    return tuple(axes.get(n) for n in range(len(inputs.args))) if inputs.args else dict(axes)


def grown(inputs: Inputs, axes: Mapping[Any, Mapping[int, str]]) -> Inputs:
    """The inputs in another shape: each dynamic axis longer."""

    def longer(key: Any, value: Any) -> Any:
        for axis, name in axes.get(key, {}).items():
            value = resized(value, axis, value.shape[axis] + GROWN[name])
        return value

    args = tuple(longer(n, value) for n, value in enumerate(inputs.args))
    return Inputs(args, {key: longer(key, value) for key, value in inputs.kwargs.items()})


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def opened(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def fed(session: Any, model: nn.Module, inputs: Inputs, feeds: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What ONNX Runtime returns. The model's inputs stand in the order of its signature."""
    tensors = tensors_in(Call.of(model, inputs, None).inputs)
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(tensors):
        raise Wrong(f"the file has the inputs {names} for {len(tensors)} tensors")
    given = dict(zip(names, tensors, strict=True)) | dict(feeds)
    arrays = {name: as_real(tensor).contiguous().numpy() for name, tensor in given.items()}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


@torch.no_grad()
def returned(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Every tensor that the model returns, integers too."""
    with checking.kept(model, training=False):
        checking.seeded()
        return [as_real(t).clone() for t in tensors_in(checking.fresh(inputs).call(model))]


def compare_file(
    session: Any, inputs: Inputs, oracle: Oracle, model: nn.Module, feeds: Mapping[str, torch.Tensor], where: str
) -> None:
    """ONNX Runtime against the oracle, whose own rounding is the measure.

    Raises:
        Wrong: they differ by more.
    """
    found, wanted, moved = (
        fed(session, model, inputs, feeds),
        returned(oracle.model, inputs),
        returned(oracle.moved().model, inputs),
    )
    exact = wanted
    with suppress(RuntimeError, NotImplementedError, TypeError):  # a kernel that takes no float64
        exact = returned(copy.deepcopy(oracle.model).double(), cast_inputs(inputs, torch.float64))
    shapes = [[(str(t.dtype), *t.shape) for t in outputs] for outputs in (found, wanted)]
    where = f"{where}inputs of {[*map(_shape, tensors_in(inputs))]}"
    if shapes[0] != shapes[1]:
        raise Wrong(f"{where}: outputs {shapes[0]}, and not {shapes[1]}")
    for n, (y, right, shifted, wide) in enumerate(zip(found, wanted, moved, exact, strict=True)):
        if not y.is_floating_point():
            if int(wrong := ((y != right) & (right == shifted) & (right == wide)).sum()):
                raise Wrong(f"{where}: {wrong} elements of the integers in output {n} differ")
            continue
        noise = max(relative_error(shifted, right, right), relative_error(right, wide, wide))
        if not (report := compare(y, right, right, noise, right.dtype)):
            raise Different(f"{where}: output {n}: {report}")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def plain_fails(base: nn.Module, inputs: Inputs, opset: int, axes: dict[str, Any]) -> str:
    """Why torch does not write the base, or ONNX Runtime does not run what it writes; empty if they do."""
    model = copy.deepcopy(base)
    call = Call.of(model, inputs, shapes_of(inputs, axes))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plain.onnx"
        try:
            torch.onnx.export(
                model, call.inputs.args, file, kwargs=call.inputs.kwargs, dynamic_shapes=call.shapes,
                opset_version=opset, dynamo=True, verbose=False,
            )  # fmt: skip
        except Exception as error:
            return f"torch's exporter: {_first(error)}"
        try:
            session = opened(file)
            for given in (inputs, *([grown(inputs, axes)] if axes else [])):
                compare_file(session, given, Oracle(base, base), base, {}, "")
        except Exception as error:
            return f"ONNX Runtime with torch's file: {_first(error)}"
    return ""


def _first(error: Exception) -> str:
    """The innermost reason, one line of it."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:240]}"
