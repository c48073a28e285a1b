"""python -m tests.hostile [names]

Small files that ask for much: a pattern that never ends, a graph that makes gigabytes, a pipe in a file's place. Each
is given to the verb that reads it, in one process, and a line says what came of it: the error, the seconds, and the
memory that the process had at its peak beyond what it had before. The exit status says whether each was refused by an
error of ours within `SECONDS` and `MEMORY`. The seconds are a processor's, of this process and of those it has started,
or a tenth of the clock's, where it waited longer than that: a busy machine refuses no later.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

SECONDS, MEMORY = 2.0, 300 * 2**20

Act = Callable[[], Any]
Case = Callable[[Path], Act]
"""Makes files in a folder, and gives the call that reads them."""


class Net(nn.Module):
    """With names as long as those of large models."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"self_attention_query_projection_a": nn.Linear(8, 6)})

    def forward(self, x):
        return self.language_model["self_attention_query_projection_a"](x)


WEIGHT = "language_model.self_attention_query_projection_a"


# ── adapters of PEFT ─────────────────────────────────────────────────────────────────────────────────────────────────


def peft_folder(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter for `Net`, as PEFT writes it."""
    from safetensors.torch import save_file

    key = f"base_model.model.{WEIGHT}.lora_"
    plain = {f"{key}A.weight": torch.ones(2, 8), f"{key}B.weight": torch.ones(6, 2)}
    save_file(tensors or plain, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [WEIGHT.rpartition(".")[2]], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def load(folder: Path) -> None:
    import lora_fx

    lora_fx.load_adapter(Net(), folder, torch.ones(3, 8))


def pattern(**config: Any) -> Case:
    return lambda folder: partial(load, peft_folder(folder, **config))


def many_tensors(folder: Path) -> Act:
    return partial(load, _crowded(peft_folder(folder) / "adapter_model.safetensors").parent)


def _crowded(file: Path) -> Path:
    """A safetensors file of 400,000 tensors without numbers."""
    rows = (f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(400_000))
    table = f"{{{','.join(rows)}}}".encode()
    file.write_bytes(len(table).to_bytes(8, "little") + table)
    return file


def many_axes(folder: Path) -> Act:
    table = f'{{"a":{{"dtype":"F32","shape":[0{",0" * 3_000_000}],"data_offsets":[0,0]}}}}'.encode()
    (peft_folder(folder) / "adapter_model.safetensors").write_bytes(len(table).to_bytes(8, "little") + table)
    return partial(load, folder)


def wide_table(folder: Path) -> Act:
    """A config of empty tables."""
    (peft_folder(folder) / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": [' + "{}," * 6_000_000 + "{}]}"
    )
    return partial(load, folder)


def pipe_config(folder: Path) -> Act:
    (peft_folder(folder) / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    return partial(load, folder)


def pipe_tensors(folder: Path) -> Act:
    (peft_folder(folder) / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    return partial(load, folder)


# ── rules and checkpoints ────────────────────────────────────────────────────────────────────────────────────────────


def rule(text: str) -> Case:
    def run(folder: Path) -> Act:
        import lora_fx

        (folder / "rules.toml").write_text(f"[[rule]]\n{text}\n")
        return partial(lora_fx.plan, Net(), str(folder / "rules.toml"), torch.ones(3, 8))

    return run


def pipe_rules(folder: Path) -> Act:
    import lora_fx

    os.mkfifo(folder / "rules.toml")
    return partial(lora_fx.plan, Net(), str(folder / "rules.toml"), torch.ones(3, 8))


def checkpoint(make: Callable[[Path], Any]) -> Case:
    def run(folder: Path) -> Act:
        import lora_fx

        make(folder / "model.safetensors")
        with torch.device("meta"):
            model = Net().eval()
        return partial(lora_fx.export_onnx, model, torch.ones(3, 8), folder / "m.onnx", weights=folder, check=False)

    return run


# ── ONNX ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def onnx_file(folder: Path, nodes: list[Any], constants: dict[str, numpy.ndarray], functions: Any = ()) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    given, gives = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy")
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [given], [gives], held)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def fold(file: Path) -> None:
    import lora_fx

    lora_fx.fold_onnx(file, file.with_name("out.onnx"))


def read(file: Path) -> None:
    import lora_fx.export

    lora_fx.export.Session(file, digest=lora_fx.export.onnx_digest(file))


def branch() -> tuple[list[Any], dict[str, numpy.ndarray]]:
    """y = x·W + x·A·B"""
    from onnx.helper import make_node

    nodes = [
        make_node("MatMul", ["x", "W"], ["base"]),
        make_node("MatMul", ["x", "lora_A"], ["down"]),
        make_node("MatMul", ["down", "lora_B"], ["up"]),
        make_node("Add", ["base", "up"], ["y"]),
    ]
    shapes = {"W": (8, 8), "lora_A": (8, 2), "lora_B": (2, 8)}
    return nodes, {name: numpy.ones(shape, numpy.float32) for name, shape in shapes.items()}


def large(verb: Callable[[Path], None], *, into: str) -> Case:
    """7.2 GB of zeros, in the way of a weight or beside it."""

    def run(folder: Path) -> Act:
        from onnx.helper import make_node

        nodes, constants = branch()
        size = numpy.array([60_000, 30_000])
        made = [make_node("ConstantOfShape", ["size"], ["zeros"]), make_node("ReduceSum", ["zeros"], ["sum"])]
        made.append(make_node("Mul" if into == "W" else "Add", [into, "sum"], ["moved"]))
        wanted = "W" if into == "W" else "y"
        if into == "W":
            nodes[0].input[1] = "moved"
            nodes = [*made, *nodes]
        else:
            nodes[-1].output[0] = "before"
            made[-1].input[0], made[-1].output[0] = "before", wanted
            nodes = [*nodes, *made]
        return partial(verb, onnx_file(folder, nodes, {**constants, "size": size}))

    return run


def doubling(verb: Callable[[Path], None]) -> Case:
    """A function that calls another one twice, which calls another one twice …"""

    def run(folder: Path) -> Act:
        from onnx import helper

        imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        made = [helper.make_function("own", "f0", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], imports)]
        for n in range(1, 30):
            inner = [helper.make_node(f"f{n - 1}", *names, domain="own") for names in ((["a"], ["m"]), (["m"], ["b"]))]
            made.append(helper.make_function("own", f"f{n}", ["a"], ["b"], inner, imports))
        nodes, constants = branch()
        nodes[-1].output[0] = "before"
        nodes.append(helper.make_node("f29", ["before"], ["y"], domain="own"))
        return partial(verb, onnx_file(folder, nodes, constants, made))

    return run


def doubled_constant(folder: Path) -> Act:
    """A constant beside itself, beside itself …"""
    from onnx.helper import make_node

    nodes, constants = branch()
    nodes[-1].output[0] = "before"
    made = [make_node("Concat", [f"c{n}"] * 2, [f"c{n + 1}"], axis=0) for n in range(40)]
    made += [make_node("ReduceSum", ["c40"], ["sum"]), make_node("Add", ["before", "sum"], ["y"])]
    return partial(fold, onnx_file(folder, [*nodes, *made], {**constants, "c0": numpy.ones((1, 8), numpy.float32)}))


def pipe(verb: Callable[[Path], None]) -> Case:
    def run(folder: Path) -> Act:
        os.mkfifo(folder / "m.onnx")
        return partial(verb, folder / "m.onnx")

    return run


def pipe_data(verb: Callable[[Path], None]) -> Case:
    """Its weights are said to be in a pipe beside it."""

    def run(folder: Path) -> Act:
        import onnx

        file = onnx_file(folder, *branch())
        proto = onnx.load(file)
        onnx.save(proto, file, save_as_external_data=True, size_threshold=0, location="data")
        (folder / "data").unlink()
        os.mkfifo(folder / "data")
        return partial(verb, file)

    return run


ENDLESS = r"(.*.*)*!"

CASES: dict[str, Case] = {
    "a pattern in target_modules": pattern(target_modules=ENDLESS),
    "a pattern in exclude_modules": pattern(exclude_modules=ENDLESS),
    "a pattern in layers_pattern": pattern(layers_pattern=ENDLESS, layers_to_transform=[1]),
    "a pattern in rank_pattern": pattern(rank_pattern={ENDLESS: 2}),
    "a pattern in alpha_pattern": pattern(alpha_pattern={ENDLESS: 2}),
    "a pattern in modules_to_save": pattern(modules_to_save=[ENDLESS]),
    "a pattern of groups": pattern(target_modules="([a-z_.]|[a-z_.]){40}!"),
    "a deep pattern": pattern(target_modules="(" * 5000 + "a" + ")" * 5000),
    "a table of six million tables": wide_table,
    "400,000 tensors": many_tensors,
    "three million axes": many_axes,
    "a pipe for a config": pipe_config,
    "a pipe for tensors": pipe_tensors,
    "a range of layers": rule('layers = "0-999999999999"\nrank = 2\nexpect = 0'),
    "a pipe for rules": pipe_rules,
    "a pipe for a shard": checkpoint(os.mkfifo),
    "a folder for a shard": checkpoint(Path.mkdir),
    "400,000 tensors in a shard": checkpoint(_crowded),
    "gigabytes of zeros in a weight": large(fold, into="W"),
    "gigabytes of zeros beside": large(fold, into="y"),
    "gigabytes of zeros in a session": large(read, into="y"),
    "functions that double": doubling(fold),
    "functions that double in a session": doubling(read),
    "a constant that doubles": doubled_constant,
    "a pipe for a graph": pipe(fold),
    "a pipe for a session": pipe(read),
    "a pipe for weights": pipe_data(fold),
    "a pipe for weights in a session": pipe_data(read),
}


def measured(name: str) -> tuple[str, float, int]:
    """What came of it, the seconds, and the bytes of memory more than before."""
    with tempfile.TemporaryDirectory() as folder:
        act = CASES[name](Path(folder))
        before, start, begin = _peak(reset=True), _processor(), time.perf_counter()
        try:
            act()
            said = "accepted"
        except Exception as error:
            from lora_fx.errors import LoraFxError

            said = ("" if isinstance(error, LoraFxError) else "RAW ") + f"{type(error).__name__}: {error}"
        seconds = max(_processor() - start, (time.perf_counter() - begin) / 10)
        return said, seconds, max(0, _peak() - before)


def _processor() -> float:
    """The seconds that this process, all its threads, and its ended children have computed."""
    return sum(os.times()[:4])


def _peak(reset: bool = False) -> int:
    """The most bytes that this process has had in memory since the last reset; Linux says so."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main(names: list[str]) -> int:
    import lora_fx
    import lora_fx.export

    with tempfile.TemporaryDirectory() as folder:  # what is imported once is no file's doing
        fold(onnx_file(Path(folder), *branch()))
        lora_fx.export_onnx(Net(), torch.ones(3, 8), Path(folder) / "n.onnx")
        lora_fx.export.Session(Path(folder) / "n.onnx")
    refused = True
    for name in names or CASES:
        said, seconds, memory = measured(name)
        good = not said.startswith(("accepted", "RAW")) and seconds <= SECONDS and memory <= MEMORY
        refused &= good
        first = said.splitlines()[0][:200]
        print(f"{'refused' if good else 'WRONG'}\t{name}\t{seconds:.2f} s\t{memory >> 20} MiB\t{first}", flush=True)
    return 0 if refused else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
