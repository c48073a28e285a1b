"""The file, and the file with its weights where they do not fit: written beside their places, moved in as one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_fx.changes import foreign, signals_wait
from lora_fx.errors import LoraFxError
from lora_fx.export.onnx.loading import SEAL, seal
from lora_fx.export.onnx.processes import checked
from lora_fx.export.onnx.runtimes import refuse, refusing

INLINE = 2**31 - 2**26
"""Bytes of weights that fit, with their graph, into a protobuf message of 2 GiB."""


def writable(path: str | os.PathLike[str], folder: bool = False) -> Path:
    """The path, of a file that can be written, or of a folder: known before minutes of work, not after them."""
    target, kinds = Path(path).absolute(), ("a file", "a folder")
    reason = ""
    if target.exists() and target.is_dir() != folder:
        reason = f"is {kinds[not folder]}"
    elif not target.parent.is_dir():
        reason = f"lies in a folder that does not exist: {target.parent}"
    else:
        try:
            tempfile.TemporaryFile(dir=target.parent, prefix=f".{target.name}.data").close()
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
    if reason:
        refuse(str(path), f"the path {reason}", f"pass the path of {kinds[folder]} in a folder you may write")
    return target


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the disk of the target, gone in the end with all that was not moved out of it."""
    with signals_wait(), foreign():
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
                yield Path(folder)
        except OSError as error:
            refuse(str(target), f"the file cannot be written: {error}", "make room, or pass another path", error)


@foreign()
def save_model(model: Any, path: Path, external_data: bool | None, suffix: str = ".data") -> list[Path]:
    """The model's file, sealed, and its data file if it has one. The model names its data file without a folder."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external_data is False and size > INLINE:
        reason = f"{size:,} bytes of weights do not fit into one ONNX file, which ends at 2 GiB"
        refuse("external_data", reason, "leave external_data out")
    data = path.with_name(f"{path.name}{suffix}")
    model.metadata_props.pop(SEAL, None)
    try:
        if not (external_data or size > INLINE):
            onnx_ir.external_data.load_to_model(model)  # what was read from another file's data
            _write(model, path)
        else:
            onnx_ir.save(model, path, external_data=data.name)
    except Exception as error:
        inner: BaseException | None = error  # of what went wrong as a tensor was made or written: onnx_ir wraps it
        while inner is not None and not isinstance(inner, LoraFxError | OSError):
            inner = inner.__cause__
        raise inner or error from error
    beside = [data] if data.exists() else []
    seal(path, beside)
    return [path, *beside]


def _write(model: Any, path: Path) -> None:
    """One message, as protobuf makes it, but without a copy of all numbers in memory: they go into the file one tensor
    after another, as the last fields of the graph."""
    import onnx
    import onnx_ir

    values = model.graph.initializers.values()
    kept = {value: value.const_value for value in values}
    streamed = {value.name: t for value, t in kept.items() if t.nbytes > _STREAMED and t.dtype.name != "STRING"}
    try:
        for value in values:
            if (tensor := streamed.get(value.name)) is not None:
                head = onnx.TensorProto(name=value.name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
                value.const_value = onnx_ir.TensorProtoTensor(head)
        proto = onnx_ir.to_proto(model)
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor
    heads = [tensor.SerializeToString() for tensor in proto.graph.initializer]
    numbers = [streamed.get(tensor.name) for tensor in proto.graph.initializer]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    raw = [b"" if tensor is None else _start(_RAW_DATA, tensor.nbytes) for tensor in numbers]
    sizes = [len(h) + len(r) + (0 if t is None else t.nbytes) for h, r, t in zip(heads, raw, numbers, strict=True)]
    starts = [_start(_INITIALIZER, size) for size in sizes]
    with open(path, "wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_start(_GRAPH, len(graph) + sum(map(len, starts)) + sum(sizes)))
        file.write(graph)
        for start, head, begin, tensor in zip(starts, heads, raw, numbers, strict=True):
            file.write(start + head + begin)
            if tensor is not None:
                before = file.tell()
                tensor.tofile(file)
                assert file.tell() - before == tensor.nbytes, f"{tensor.name}: other bytes than its shape says"


_STREAMED = 1024  # bytes: what has more of them goes straight from where it is into the file
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # numbers of the fields in onnx.proto: of ModelProto, GraphProto, TensorProto


def _start(field: int, size: int) -> bytes:
    """What stands before the bytes of a field: its number, that its length comes, and that, seven bits in a byte."""
    said = [field << 3 | 2]
    while size >> 7:
        said.append(size & 127 | 128)
        size >>= 7
    return bytes([*said, size])


def check_file(path: Path) -> None:
    remedy = "try another opset; report it to lora_fx with the model if no opset helps"
    with refusing("onnx.checker refuses the file", path.name, remedy):
        checked(path)


def move_folder(made: Path, files: list[Path], configs: list[Path], target: Path) -> None:
    """Put a checked folder in place: in one step, or into the one that is there, file by file, the graph last."""
    if not target.exists():
        os.replace(made, target)
        return
    for file in configs:
        os.replace(file, target / file.relative_to(made))
    graph = target / files[0].relative_to(made)
    graph.parent.mkdir(exist_ok=True)
    move_files(files, graph)


def move_files(files: list[Path], target: Path) -> None:
    """Put the checked files in place, the graph last. At every moment the graph there has its own weights beside it."""
    places = [target.with_name(file.name) for file in files]
    taken = len(files) > 1 and places[1].exists()
    if taken:
        _pass(files[0], files[1], target)
    try:
        for file, place in reversed([*zip(files, places, strict=True)]):
            os.replace(file, place)
    except BaseException:
        if len(files) > 1 and not taken:
            places[1].unlink(missing_ok=True)
        raise
    for stale in target.parent.iterdir():
        if re.fullmatch(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}\.data", stale.name):
            stale.unlink()


def _pass(graph: Path, data: Path, target: Path) -> None:
    """An old graph may have its weights under the data's name. Put one in its place that has a copy of the new ones
    under a name that was free: from then on nothing needs the old weights. (No hard link: onnx refuses those.)"""
    import onnx
    from onnx.external_data_helper import _get_all_tensors

    aside, passing = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data"), graph.with_name("passing")
    model = onnx.load(graph, load_external_data=False)
    for tensor in _get_all_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = aside.name
    kept = [entry for entry in model.metadata_props if entry.key != SEAL]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    passing.write_bytes(model.SerializeToString())
    seal(passing, [data])
    try:
        shutil.copyfile(data, aside)
        os.replace(passing, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
