"""ONNX Runtime in a process of its own: what ends that process ends no other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from lora_fx import export_onnx, fold_onnx
from lora_fx.errors import ExportError
from lora_fx.export.onnx import processes, worker
from lora_fx.export.onnx.loading import load_model

pytestmark = pytest.mark.onnx
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

MODEL, X = nn.Linear(3, 2), torch.ones(4, 3)


@pytest.fixture
def old(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    return tmp_path / "m.onnx"


@pytest.fixture
def fresh(monkeypatch):
    """The process that the test starts, and no other."""
    monkeypatch.setattr(processes, "_runners", own := [])
    yield own
    for runner in own:
        runner.end()


def untouched(path: Path) -> bool:
    return [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == b"old"


def faulty(folder: Path, monkeypatch, line: str, do: str = "run") -> None:
    """The program with a line more where it is asked to run a file, or to do something else with it."""
    text, place = Path(worker.__file__).read_text(), f'if said["do"] == "{do}":\n'
    assert text.count(place) == 1
    program = folder / "worker_that_fails.py"
    program.write_text(text.replace(place, f"{place}            {line}\n"))
    monkeypatch.setattr(worker, "__file__", str(program))


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("os.abort()", "by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "by SIGKILL"),
        ("print('out of memory', flush=True) or os._exit(3)", "with exit code 3; it said last: out of memory"),
    ],
    ids=["abort", "kill", "exit"],
)
@pytest.mark.skipif(os.name == "nt", reason="signals have no names there")
def test_a_crash_of_the_runtime_is_an_error(old, tmp_path_factory, monkeypatch, fresh, line, how):
    with monkeypatch.context() as patch:
        faulty(tmp_path_factory.mktemp("program"), patch, line)
        with pytest.raises(ExportError, match=f"the process in which it ran the file has ended {how}") as caught:
            export_onnx(MODEL, X, old)
    assert "check=False" in str(caught.value) and untouched(old)
    assert not fresh[0].alive
    if line == "os.abort()":
        assert export_onnx(MODEL, X, old).comparisons  # in another one


@pytest.mark.skipif(os.name == "nt", reason="signals have no names there")
def test_a_crash_of_the_checker_is_an_error(old, tmp_path_factory, monkeypatch, fresh):
    faulty(tmp_path_factory.mktemp("program"), monkeypatch, "os.abort()", "check")
    with pytest.raises(ExportError, match="has ended by SIGABRT"):
        export_onnx(MODEL, X, old)
    assert untouched(old)


class Half(nn.Module):
    """ONNX Runtime 1.32 ends with a segmentation fault on its file, if its batch is dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, batch_first=True).half()

    def forward(self, x):
        return self.lstm(x)[0]


def test_a_file_that_crashes_the_runtime_ends_nothing(old, fresh):
    """With a remedy that helps."""
    x, message = torch.ones(2, 3, 4).half(), ""
    try:
        export_onnx(Half(), x, old, dynamic_shapes={"x": {0: "batch"}})
    except ExportError as error:
        message = str(error)
        assert untouched(old) and not fresh[0].alive
    assert not message or ("has ended" in message and "fewer axes dynamic" in message)
    assert export_onnx(Half(), x, old).comparisons


def test_it_is_started_once_and_again_where_it_has_ended(fresh, tmp_path):
    path, x = tmp_path / "m.onnx", {"x": numpy.ones((4, 3), numpy.float32)}
    write_file(path)
    with processes.Apart(path) as first, processes.Apart(path) as second:
        assert len(fresh) == 1 and [one.run(x)[0].tolist() for one in (first, second)] == [[[2.0] * 3] * 4] * 2
        assert (first.inputs, first.outputs) == ([("x", "tensor(float)", (4, 3))], ["y"])
        fresh[0]._process.kill()
        fresh[0]._process.wait()
        with pytest.raises(ExportError, match="has ended by SIGKILL"):
            first.run(x)
    with processes.Apart(path) as third:
        assert third.run(x)[0].shape == (4, 3)


def write_file(path: Path, op: str = "Add") -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ["x", "x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [4, 3])],
        [onnx.helper.make_tensor_value_info("y", 1, [4, 3])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), path)


@pytest.mark.parametrize(
    "array",
    [numpy.float32(3), numpy.zeros((0, 2), numpy.int64), numpy.arange(6.0).reshape(2, 3).T, numpy.array([True, False])],
    ids=["scalar", "empty", "not contiguous", "bool"],
)
def test_arrays_pass_through_a_pipe_bit_for_bit(array):
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:
        worker.write(writer, worker.packed({"do": "run"}, {"a": array, "b": array}))
        said, found = worker.read(reader)
    assert said == {"do": "run"}
    for got in found.values():
        assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes()


def test_a_relative_path_is_that_of_the_caller(fresh, tmp_path, monkeypatch):
    """Who may have gone to another folder since the process began."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert export_onnx(MODEL, X, f"{name}.onnx").comparisons
    with processes.Apart(Path("second.onnx")) as session:
        assert session.outputs


def test_what_the_runtime_raises_has_its_name(fresh, tmp_path):
    write_file(tmp_path / "m.onnx", "Nonsense")
    with pytest.raises(processes.Said, match="Nonsense") as caught:
        processes.Apart(tmp_path / "m.onnx")
    assert type(caught.value).__name__ == "InvalidGraph" and fresh[0].alive


def test_an_interrupt_ends_it(old, monkeypatch, fresh):
    """What would come later would be taken for the answer to another question."""
    real = worker.read

    def interrupted(pipe):
        if fresh:  # it has started
            raise KeyboardInterrupt
        return real(pipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker, "read", interrupted)
        export_onnx(MODEL, X, old)
    assert untouched(old) and not fresh[0].alive and fresh[0]._process.returncode is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_has_its_own(fresh, tmp_path):
    write_file(tmp_path / "m.onnx")
    with processes.Apart(tmp_path / "m.onnx") as session:
        child = os.fork()
        if not child:
            os._exit(1 if fresh[0].alive else 0)
        assert os.waitpid(child, 0)[1] == 0
        assert session.run({"x": numpy.ones((4, 3), numpy.float32)})[0].shape == (4, 3)


def test_it_goes_with_the_python_process(tmp_path):
    write_file(tmp_path / "m.onnx")
    program = (
        "import sys\nfrom pathlib import Path\nfrom lora_fx.export.onnx import processes\n"
        f"session = processes.Apart(Path({str(tmp_path / 'm.onnx')!r}))\n"
        "print(processes._runners[0]._process.pid, flush=True)\n"
        "import os; os._exit(0)\n"  # as if it was killed
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_without_an_interpreter_it_says_so(old, monkeypatch, fresh):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ExportError, match="no Python interpreter") as caught:
        export_onnx(MODEL, X, old)
    assert "check=False" in str(caught.value) and untouched(old)
    assert export_onnx(MODEL, X, old, check=False).not_run == "check=False"


def test_a_crash_while_two_files_are_compared(tmp_path, tmp_path_factory, monkeypatch, fresh):
    from tests.test_onnx_folding import summed

    path = summed(tmp_path)
    faulty(tmp_path_factory.mktemp("program"), monkeypatch, "os.abort()")
    with pytest.raises(ExportError, match="has ended by SIGABRT"):
        fold_onnx(path, tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_program_imports_nothing_of_ours():
    tree = ast.parse(Path(worker.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes for alias in node.names} | {getattr(node, "module", "") for node in nodes}
    assert not {name.partition(".")[0] for name in names} & {"lora_fx", "torch"}


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("os.abort()", "the process in which it read the graph has ended by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "the process in which it read the graph has ended by SIGKILL"),
        ("import time; time.sleep(20)", "has ended after 2 s without an answer"),
        ("_bound(said['memory']); bytearray(2**34)", "MemoryError"),
    ],
    ids=["abort", "kill", "hang", "memory"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="there signals have these names, and memory has limits")
def test_what_a_graph_of_somebody_else_does_to_its_reader_is_an_error(
    tmp_path, old, tmp_path_factory, monkeypatch, fresh, line, how
):
    path = tmp_path_factory.mktemp("theirs") / "theirs.onnx"
    write_file(path)
    before = path.read_bytes()
    monkeypatch.setattr(processes, "_SHAPES", replace(processes._SHAPES, patience=2.0))
    with monkeypatch.context() as patch:
        faulty(tmp_path_factory.mktemp("program"), patch, line, "shapes")
        with pytest.raises(ExportError, match=how) as caught:
            fold_onnx(path, old)
    assert caught.value.place == str(path) and untouched(old) and path.read_bytes() == before
    monkeypatch.setattr(processes, "_SHAPES", replace(processes._SHAPES, patience=120.0))
    assert load_model(path, "remedy").graph.outputs  # by another one


def test_what_a_graph_may_take_grows_with_it(monkeypatch, fresh):
    asked = []
    monkeypatch.setattr(processes.Runner, "ask", lambda self, said, arrays: asked.append(said) or ({}, arrays))
    for size in (10, 2**20):
        assert processes.with_shapes(bytes(size)) == bytes(size)
    assert asked[1]["memory"] - asked[0]["memory"] == 8 * (2**20 - 10) and asked[0]["memory"] > 2**30


def test_shapes_are_read_elsewhere(tmp_path, monkeypatch, fresh):
    """By one process for all files; here only where there is no interpreter for another one."""
    path, here, real = tmp_path / "m.onnx", [], onnx.shape_inference.infer_shapes
    write_file(path)
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda *a, **k: here.append(1) or real(*a, **k))
    load_model(path, "remedy")
    load_model(path, "remedy")
    assert [runner.program.name for runner in fresh] == ["shapes"] and not here
    monkeypatch.setattr(sys, "executable", "")
    load_model(path, "remedy")
    assert here == [1]
