"""ONNX files that somebody else made: nothing is read outside of their folder, and no more is made than they show.

    location, offset, length     of external data: a regular file in the file's folder, and inside of that
    dims, type, bytes            of a tensor say the same
    functions                    are no circle, and put into their places they are a graph of bounded size
    constants                    take bounded memory, as far as their shapes can be known without them

All of that is looked at in the message itself, before onnx_ir, onnx or ONNX Runtime reads a number or runs a node.

A file that we wrote ends in a seal: the digest of all that is before it and of the weights beside it. For protobuf
that is one more entry of the metadata, for an ``.onnx_adapter`` (a flatbuffer) bytes after its end: who knows nothing
of it reads the file as ever.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_fx.errors import ExportError
from lora_fx.export.onnx.processes import has_interpreter, with_shapes
from lora_fx.export.onnx.runtimes import refuse, refusing, require
from lora_fx.reading import RESTORE, regular

NODES = 10_000
"""More nodes than there are written: so many at most come from functions, put into their places."""

MADE = 2**31
"""Bytes of constants that a graph makes of constants: as many as an ONNX file can hold."""

FILE = 2**31 - 1
"""Bytes of a protobuf message."""

SEAL = "lora_fx.sha256"
_ENTRY = b"\x72\x52\x0a\x0e" + SEAL.encode() + b"\x12\x40"  # metadata_props { key: SEAL, value: 64 characters }
_SMALL = 1024  # bytes: a shape, which inference has to see the numbers of


@dataclass(frozen=True)
class OnnxFile:
    """A file that has been looked at."""

    path: Path
    proto: Any
    data: tuple[Path, ...]
    """The files with its weights."""

    @property
    def digest(self) -> str:
        return digest(self.path, self.data)


def load_model(path: Path, remedy: str) -> Any:
    """The model, of onnx_ir.

    Raises:
        ExportError: it cannot be read, or not safely.
    """
    import onnx_ir

    file = read_file(path, remedy)
    with refusing("it cannot be read", str(path), remedy):
        model = onnx_ir.from_proto(file.proto)
        onnx_ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def read_file(path: Path, remedy: str) -> OnnxFile:
    """The message of a file, and which files its weights are in; none of them is read.

    Raises:
        ExportError: it is no ONNX file, or not one that can be read safely.
    """
    onnx = require("onnx")
    with refusing("it cannot be read", str(path), remedy):
        size = regular(path, remedy).stat().st_size
        if size > FILE:
            refuse(str(path), f"it has {size:,} bytes, and ONNX ends at 2 GiB", remedy)
        proto = onnx.ModelProto.FromString(path.read_bytes())
        if not proto.graph.output:
            refuse(str(path), "it has no graph", remedy)
        look = _Look(path, proto, remedy)
        look.tensors()
        look.order()
        look.functions()
        look.constants()
        return OnnxFile(path, proto, tuple(sorted(look.data)))


class _Look:
    """What is looked at in a message."""

    def __init__(self, path: Path, proto: Any, remedy: str) -> None:
        self.path, self.place, self.proto, self.remedy = path, str(path), proto, remedy
        self.data: set[Path] = set()

    def tensors(self) -> None:
        """Each has the bytes that its shape and type ask for."""
        for placed, holders in ((True, self._graphs()), (False, _nested(self.proto.functions))):
            for tensor in (tensor for holder in holders for tensor in _tensors(holder)):
                self._tensor(tensor, placed)

    def _graphs(self) -> Iterator[Any]:
        trained = [g for info in self.proto.training_info for g in (info.initialization, info.algorithm)]
        return _nested([self.proto.graph, *trained])

    def _tensor(self, tensor: Any, placed: bool) -> None:
        import onnx
        import onnx_ir

        place, remedy = f"{self.place}, tensor {tensor.name!r}", self.remedy
        dims = [*tensor.dims]
        if any(size < 0 for size in dims):
            refuse(place, f"its shape is {dims}", remedy)
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if tensor.data_type == onnx.TensorProto.STRING and not external:
            return
        with refusing(f"its type is {tensor.data_type}", place, remedy):
            size = math.ceil(math.prod(dims) * onnx_ir.DataType(tensor.data_type).itemsize)
        if external and not placed:
            refuse(place, "it is in a function, and its numbers in another file", remedy)
        if external:
            self._external(tensor, size, place)
        elif tensor.raw_data and len(tensor.raw_data) != size:
            refuse(place, f"{dims} are {size:,} bytes, and it has {len(tensor.raw_data):,}", remedy)

    def _external(self, tensor: Any, size: int, place: str) -> None:
        """Its numbers are in a file beside this one, and all of them."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location, known = entries.get("location", ""), {"location", "offset", "length", "checksum"}
        if not entries.keys() <= known or len(entries) < len(tensor.external_data):
            said = ", ".join(repr(entry.key[:40]) for entry in tensor.external_data)
            refuse(place, f"its numbers are given by {said}, each of which must be one of {sorted(known)}", self.remedy)
        name, remedy = PurePosixPath(location), self.remedy
        odd = not location or "\\" in location or "\0" in location or ":" in location
        if odd or name.is_absolute() or ".." in name.parts:
            refuse(place, f"its numbers are in {location!r}, which names no file in this one's folder", remedy)
        file, folder = self.path.parent / name, self.path.parent.resolve()
        if not regular(file, f"{remedy}, with its weights beside it").resolve().is_relative_to(folder):
            refuse(place, f"its numbers are in {location!r}, a link out of this one's folder", remedy)
        offset, length = (self._number(entries, key, place) for key in ("offset", "length"))
        there, wanted = file.stat().st_size, size if length is None else length
        if wanted != size or (offset or 0) + size > there:
            reason = f"{[*tensor.dims]} are {size:,} bytes, and it has {wanted:,} from {offset or 0:,} on"
            refuse(place, f"{reason} of the {there:,} in {location!r}", remedy)
        self.data.add(file)

    def _number(self, entries: dict[str, str], key: str, place: str) -> int | None:
        text = entries.get(key)
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            refuse(place, f"the {key} of its numbers is {text[:40]!r}", self.remedy)
        return int(text)

    def order(self) -> None:
        """A node reads what nodes before it have made: whoever follows values back comes to an end."""
        for graph in (*self._graphs(), *_nested(self.proto.functions)):
            later = {name: node for node in graph.node for name in node.output if name}
            for node in graph.node:
                early = [name for name in node.input if name in later]
                if early:
                    reason = f"node {node.name or node.op_type} reads {', '.join(early)}, which it or a later node "
                    remedy = "put its nodes into order (onnx.checker says more); a circle has none"
                    refuse(self.place, f"{reason}makes", remedy)
                for name in node.output:
                    later.pop(name, None)

    def functions(self) -> None:
        """Put into their places they are a graph that ends, and is not much larger than what is written."""
        bodies = {(f.domain, f.name, f.overload): f for f in self.proto.functions}
        sizes: dict[Any, int] = {}
        inside: list[Any] = []

        def size(body: Any) -> int:
            found = 0
            for node in body.node:
                key = node.domain, node.op_type, node.overload
                found += called(key) if key in bodies else 1
                found += sum(map(size, _inner(node)))
            return found

        def called(key: Any) -> int:
            if key in inside:
                refuse(self.place, f"the function {key[1]!r} calls itself", self.remedy)
            if key not in sizes:
                inside.append(key)
                sizes[key] = size(bodies[key])
                inside.pop()
            return sizes[key]

        total = size(self.proto.graph)
        if total > NODES + sum(len(graph.node) for graph in self._graphs()):
            reason = f"its functions, put into their places, are {total:,} nodes"
            refuse(self.place, reason, f"{self.remedy}; {NODES:,} more than are written are the most")

    def constants(self) -> None:
        """What the graph makes of constants alone, which ONNX Runtime makes as it loads."""
        known = self._with_shapes(_lean(self.proto))
        held = {t.name for t in self.proto.graph.initializer} - {v.name for v in self.proto.graph.input}
        made = _made(known.graph, held)
        if made > MADE:
            reason = f"it makes constants of {made:,} bytes, of {self.path.stat().st_size:,} that it has"
            refuse(self.place, reason, f"{self.remedy}; {MADE:,} are the most")

    def _with_shapes(self, lean: Any) -> Any:
        """Inferred in another process; in this one only where none can be started."""
        import onnx

        if not has_interpreter():
            return onnx.shape_inference.infer_shapes(lean, data_prop=True)
        try:
            return onnx.ModelProto.FromString(with_shapes(lean.SerializeToString()))
        except ExportError as error:  # of the other process, which knows no path
            refuse(self.place, error.reason, self.remedy, error)


def _nested(holders: Iterable[Any]) -> Iterator[Any]:
    """Graphs or functions, and the graphs inside of their nodes."""
    queue = [*holders]
    while queue:
        yield (graph := queue.pop())
        queue += (inner for node in graph.node for inner in _inner(node))


def _inner(node: Any) -> Iterator[Any]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(holder: Any) -> Iterator[Any]:
    """Those of a graph or a function itself."""
    sparse = [*getattr(holder, "sparse_initializer", ())]
    yield from getattr(holder, "initializer", ())
    for attributes in (*(node.attribute for node in holder.node), getattr(holder, "attribute_proto", ())):
        for attribute in attributes:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse += [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ())]
            sparse += attribute.sparse_tensors
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _lean(proto: Any) -> Any:
    """The model with what its initializers are, and without their numbers, where they are no shapes."""
    import onnx

    made, graph = onnx.ModelProto(), proto.graph
    made.ir_version = proto.ir_version
    for field in ("opset_import", "functions"):
        getattr(made, field).extend(getattr(proto, field))
    for field in ("node", "input", "output"):
        getattr(made.graph, field).extend(getattr(graph, field))
    made.graph.name = graph.name
    given = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.ByteSize() <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            made.graph.initializer.append(tensor)
        elif tensor.name not in given:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, [*tensor.dims])
            made.graph.input.append(value)
    return made


def _made(graph: Any, constant: set[str]) -> int:
    """Bytes of the values of known shape that are made of constants."""
    import onnx_ir

    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    held, total = set(constant), 0
    for node in graph.node:
        inner = [*_inner(node)]
        total += sum(_made(body, held | {t.name for t in body.initializer}) for body in inner)
        if inner or not all(name in held for name in node.input if name):
            continue
        held.update(node.output)
        for kind in (types[name] for name in node.output if name in types and node.op_type != "Constant"):
            sizes = [size.dim_value for size in kind.shape.dim]
            if kind.elem_type and kind.HasField("shape") and all(size > 0 for size in sizes):
                element = 8 if kind.elem_type == onnx_ir.DataType.STRING else onnx_ir.DataType(kind.elem_type).itemsize
                total += math.ceil(math.prod(sizes) * element)
    return total


# ── the seal ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def digest(path: Path, data: Sequence[Path] = ()) -> str:
    """sha256 over those of the file up to its seal, and of each file with weights."""
    whole = hashlib.sha256()
    for file, size in ((path, _unsealed(path)), *((own, own.stat().st_size) for own in data)):
        own = hashlib.sha256()
        with open(file, "rb") as numbers:
            while size and (chunk := numbers.read(min(size, 2**20))):
                own.update(chunk)
                size -= len(chunk)
        whole.update(own.digest())
    return whole.hexdigest()


def said(path: Path) -> str:
    """The digest in a file's seal; empty where it has none."""
    with open(path, "rb") as file:
        file.seek(_unsealed(path))
        return file.read()[len(_ENTRY) :].decode("ascii", "replace")


def _unsealed(path: Path) -> int:
    """The bytes before the seal."""
    size, seal = path.stat().st_size, len(_ENTRY) + 64
    with open(path, "rb") as file:
        file.seek(max(0, size - seal))
        return size - seal if file.read(len(_ENTRY)) == _ENTRY else size


def seal(path: Path, data: Sequence[Path] = ()) -> None:
    """Write the digest behind a file, in the place of one that is there."""
    text, size = digest(path, data).encode(), _unsealed(path)
    with open(path, "r+b") as file:
        file.truncate(size)
        file.seek(size)
        file.write(_ENTRY + text)


def check_sealed(path: Path, given: str | None) -> None:
    """The file, with the weights beside it, is the one that was written, or the one whose digest is given.

    Raises:
        ExportError: it is another one, or cannot be read.
    """
    file = read_file(path, "pass the path of a file that export_onnx wrote, with its .data file beside it")
    with refusing("it cannot be read", str(path), RESTORE):
        found, wanted = file.digest, said(path)
    if (wanted if given is None else given) == found:
        return
    remedy = "restore the file, or export the model again"
    if given is not None:
        refuse(str(path), f"its digest is {found}, not the {given!r} that was given", remedy)
    known = any(entry.key == SEAL for entry in file.proto.metadata_props)
    reason = "it is not what export_onnx wrote: it or its weights are damaged, or were changed since"
    reason = reason if known else "it has no digest: it is from before lora_fx wrote one, or of another tool"
    refuse(str(path), reason, f"{remedy}; if you trust it as it is, pass digest={found!r}, as onnx_digest says")


def check_adapter(path: Path, remedy: str) -> None:
    """An ``.onnx_adapter`` file is the one that was written.

    Raises:
        ExportError: it is another one, or has no digest.
    """
    found, wanted = digest(regular(path, remedy)), said(path)
    if not wanted:
        reason = "it has no digest: it is from before lora_fx wrote one, of another tool, or damaged"
        refuse(str(path), reason, "save it again with save_onnx_adapter")
    if found != wanted:
        refuse(str(path), "its digest is not the one it was written with: it is damaged", RESTORE)


def onnx_digest(path: str | os.PathLike[str]) -> str:
    """The digest of an ONNX file and the weights beside it, as `export_onnx` writes it into the file.

    A tool that changes the file (quantises, optimises it) changes its digest: ``Session(path, digest=…)`` is told the
    one that it then has.

    Raises:
        ExportError: it cannot be read.
    """
    return read_file(Path(path), "pass the path of an ONNX file").digest
