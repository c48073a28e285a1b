"""The program of the processes that run files in ONNX Runtime, or read graphs, for us; see
`lora_fx.export.onnx.processes`.

It is started by its path, and imports nothing of lora_fx, which would bring torch. A message is a line of JSON, with
types and shapes of the arrays whose bytes follow it: nothing that comes through the pipe can be code.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO


def packed(said: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[Any]:
    """A message, in pieces of bytes.

    Raises:
        TypeError: an array is one of objects.
    """
    import numpy

    whole = {name: numpy.asarray(array, order="C") for name, array in arrays.items()}
    table = [[name, array.dtype.str, array.shape] for name, array in whole.items()]
    head = json.dumps({**said, "arrays": table}).encode() + b"\n"
    return [head, *(array.reshape(-1).view(numpy.uint8).data for array in whole.values())]


def write(pipe: BinaryIO, message: list[Any]) -> None:
    for part in message:
        pipe.write(part)
    pipe.flush()


def read(pipe: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said, and the arrays.

    Raises:
        EOFError: the other process has ended.
    """
    import numpy

    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    said, arrays = json.loads(line), {}
    for name, dtype, shape in said.pop("arrays"):
        data = bytearray(math.prod(shape) * numpy.dtype(dtype).itemsize)
        left = memoryview(data)
        while left:
            count = pipe.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            left = left[count:]
        arrays[name] = numpy.frombuffer(data, dtype).reshape(shape)
    return said, arrays


class Runner:
    """Sessions by number."""

    def __init__(self) -> None:
        import onnxruntime

        self.runtime, self.sessions = onnxruntime, dict[int, Any]()

    def answer(self, said: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if said["do"] == "open":
            session = self.sessions[said["number"]] = self._session(said)
            inputs = [[value.name, value.type, value.shape] for value in session.get_inputs()]
            return {"inputs": inputs, "outputs": [value.name for value in session.get_outputs()]}, {}
        if said["do"] == "run":
            outputs = self.sessions[said["number"]].run(None, arrays)
            return {}, {str(n): output for n, output in enumerate(outputs)}
        if said["do"] == "optimize":
            self._session(said)
        elif said["do"] == "check":
            import onnx

            onnx.checker.check_model(said["path"], full_check=True)
        else:
            self.sessions.pop(said["number"], None)
        return {}, {}

    def _session(self, said: dict[str, Any]) -> Any:
        options = self.runtime.SessionOptions()
        options.log_severity_level = 3  # of warnings, one comes for every slot: it can be overridden
        options.intra_op_num_threads = said.get("threads", 0)
        if said["do"] == "optimize":
            options.graph_optimization_level = self.runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = said["target"]
            # Numbers in a file of their own: only the nodes are read.
            options.add_session_config_entry("session.disable_prepacking", "1")  # nothing will run
            name = f"{os.path.basename(said['target'])}.data"
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", name)
        return self.runtime.InferenceSession(said["path"], options, providers=["CPUExecutionProvider"])


class Shapes:
    """The shapes in a graph that anybody may have made, in bounded memory."""

    def __init__(self) -> None:
        import onnx

        self.onnx = onnx

    def answer(self, said: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        import numpy

        if said["do"] == "shapes":
            _bound(said["memory"])
            graph = self.onnx.ModelProto.FromString(arrays["graph"].tobytes())
            known = self.onnx.shape_inference.infer_shapes(graph, data_prop=True).SerializeToString()
            return {}, {"graph": numpy.frombuffer(known, numpy.uint8)}
        return {}, {}


def _bound(memory: int) -> None:
    """So many bytes more than there are, where the system knows how."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as sizes:
            taken = int(sizes.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = taken + memory
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


_PROGRAMS: dict[str, type[Runner | Shapes]] = {"runtime": Runner, "shapes": Shapes}


def main(program: type[Runner | Shapes]) -> None:
    """Answer what comes in, until nothing more can come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is meant for the parent, which ends this process if it wants
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    runner: Runner | Shapes | None = None
    while True:
        try:
            if runner is None:
                runner, message = program(), packed({}, {})
            else:
                message = packed(*runner.answer(*read(requests)))
        except EOFError:
            return
        except Exception as error:
            message = packed({"error": type(error).__name__, "message": str(error)}, {})
        write(answers, message)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    main(_PROGRAMS[sys.argv[2]])
