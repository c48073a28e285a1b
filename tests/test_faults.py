"""Whatever ends a verb early, wherever it is: the model is bitwise what it was, a file is the old or the new one."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx import LoraFxError, Rule, application, changes
from lora_fx.checks import alignment, certification, flow, regions, rewritten, uses, verification
from lora_fx.deltas import ahead, exact_sum
from lora_fx.deltas.exact_sum import ExactSum, Tile
from lora_fx.errors import ExportError, FileError, FoldError
from lora_fx.export.adapters import files as adapter_files
from lora_fx.export.adapters import folder as adapter_folder
from lora_fx.export.adapters import own, peft_files, values
from lora_fx.export.adapters import replace as replacing
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model import behind, classes, marks
from lora_fx.model.inventory import inventory
from lora_fx.passes import activate as activating
from lora_fx.passes import fold as folding
from lora_fx.passes import insert, wiring
from tests import reference
from tests import test_rewrites as rewrites
from tests.processes import elsewhere

DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"


class Small(nn.Module):
    """A tied weight of which one use is adapted, a weight another module reads, one that dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.side, self.head = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.BatchNorm1d(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(x)))
        x = x + F.linear(x, self.side.weight) if x.is_contiguous() else x  # a decision: no graph is baked
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


IDS = torch.arange(10).reshape(2, 5)
RULES = [Rule(form="linear", where="head", rank=2, alpha=3), Rule(where="up | down | side", rank=3, alpha=5)]


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Small().to(dtype)


def adapted(*names: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = small(dtype)
    for name in names or ("one",):
        lora_fx.apply(model, RULES, IDS, name=name, check=False)
    reference.fill(model)
    return lora_fx.activate(model, (names or ("one",))[0])


def folded(*names: str) -> nn.Module:
    return lora_fx.fold(adapted(*names))


def behind_blocks() -> nn.Module:
    return lora_fx.apply(rewrites.model(), [rewrites.LAYERS], rewrites.IDS, check=False)


def graph_module() -> nn.Module:
    torch.manual_seed(0)
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)))
    lora_fx.apply(model, Rule(where="*", rank=2), torch.randn(3, 6), name="one", check=False)
    reference.fill(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    lora_fx.save_adapter(adapted("one"), folder, name="one", peft=False)
    return folder


def fold_ahead(model: nn.Module) -> nn.Module:
    """As where asking a device takes long: all that blocks have to know is found out before one is written."""
    with mock.patch.object(ahead, "waits", lambda device: True):
        return lora_fx.fold(model)


#: verb → (a model that it can be called on, the call)
@functools.cache
def other_numbers() -> Path:
    """A file with other numbers than `adapted` has, and another scale."""
    with torch.random.fork_rng():
        model = adapted("one")
        for adapter in inventory(model).adapters:
            adapter.alpha = 5.0
            adapter.B.data.mul_(-2)
        lora_fx.save_adapter(model, folder := Path(tempfile.mkdtemp()), name="one", peft=False)
    return folder


VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "fold": (adapted, lora_fx.fold),
    "fold, final": (adapted, lambda model: lora_fx.fold(model, final=True)),
    "fold, bfloat16": (lambda: adapted(dtype=torch.bfloat16), lora_fx.fold),
    "fold, as on a GPU": (lambda: adapted(dtype=torch.bfloat16), lambda model: fold_ahead(model)),
    "fold, graph module": (graph_module, lora_fx.fold),
    "unfold": (folded, lora_fx.unfold),
    "switch": (lambda: folded("one", "two"), lambda model: lora_fx.switch(model, {"two": 0.5})),
    "activate": (lambda: adapted("one", "two"), lambda model: lora_fx.activate(model, {"two": -2})),
    "rename": (lambda: adapted("one", "two"), lambda model: lora_fx.rename(model, "one", "three")),
    "load_adapter, in place": (
        lambda: (other_numbers(), adapted())[1],
        lambda model: lora_fx.load_adapter(model, other_numbers(), name="one"),
    ),
    "remove": (lambda: adapted("one", "two"), lambda model: lora_fx.remove(model, "one")),
    "remove, all": (adapted, lambda model: lora_fx.remove(model, "one")),
    "remove, behind blocks": (lambda: behind_blocks(), lambda model: lora_fx.remove(model, "default")),
    "remove, graph module": (graph_module, lambda model: lora_fx.remove(model, "one")),
    "apply": (small, lambda model: lora_fx.apply(model, RULES, IDS, name="two")),
    "apply, another": (adapted, lambda model: lora_fx.apply(model, RULES, IDS, name="two")),
}
#: those that leave the model as it was, which they change for a while
CHECKS = {
    "certify": (adapted, lambda model: lora_fx.certify(model, IDS)),
    "certify, folded": (folded, lambda model: lora_fx.certify(model, IDS)),
}


# ── what a model is ──────────────────────────────────────────────────────────────────────────────────────────────────


class Look:
    """Every module, its class, and the very objects it holds, in their order; every flag, torch's too; every bit."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for m in model.modules() for p in m._parameters.values() if p is not None]
        self.parts, self.numbers = self.held(model), self.bits(model)

    def held(self, model: nn.Module) -> list[Any]:
        return (
            [
                (name, type(m), _method(m), [(key, id(v), _entries(v)) for key, v in m.__dict__.items()])
                for name, m in model.named_modules()
            ]
            + [(id(p), p.requires_grad) for p in self.parameters]
            + [switches()]
        )

    def bits(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {**reference.bits(model), **{str(n): p.detach().clone() for n, p in enumerate(self.parameters)}}

    def same(self, model: nn.Module) -> bool:
        return self.held(model) == self.parts and reference.same_bits(self.bits(model), self.numbers)


def switches() -> tuple[Any, ...]:
    """What Python, torch and lora_fx keep for a thread or the process, and a verb sets for a while."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    signals = changes._signals.waits, changes._signals.shut, changes._signals.foreign
    return torch.is_grad_enabled(), fast, onednn, sys.getprofile(), signals


def whole(model: nn.Module) -> list[Any]:
    """What a verb makes of a model, but for the numbers."""
    names = [(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    classes = [(type(m).__name__, getattr(type(m), "_lora_fx", None)) for m in model.modules()]
    return [names, classes, lora_fx.adapters(model), inventory(model).folded]


def _method(module: nn.Module) -> Any:
    return type(module).forward if isinstance(module, fx.GraphModule) else None


def _entries(value: Any) -> Any:
    return [(key, id(v)) for key, v in value.items()] if isinstance(value, dict) else None


def test_the_look_sees_what_a_verb_changes() -> None:
    for make, call in VERBS.values():
        model = make()
        before = Look(model)
        assert before.same(model)
        call(model)
        assert not before.same(model)


# ── at every line ────────────────────────────────────────────────────────────────────────────────────────────────────

FILES = {
    m.__file__
    for m in (
        application, changes, classes, marks, wiring, folding, ahead, exact_sum, insert, adapter_files, certification,
        flow, uses, verification, own, peft_files, values, activating, replacing, behind, alignment, regions, rewritten,
    )
}  # fmt: skip


#: Python looks for signals, and for what other threads throw, at calls and jumps: not between two lines in here, which
#: take a lock, put handlers in their places, and turn switches
UNTOUCHED = {
    function.__wrapped__.__code__
    for function in (changes.in_turn, changes.signals_wait, changes.foreign, changes.Switch.set_for_now)
}


class Lines:
    """Watch the lines of the library that run, and do something at one of them."""

    def __init__(self, at: int = -1, act: Callable[[], Any] = lambda: None) -> None:
        self.at, self.act, self.seen = at, act, []

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in FILES and frame.f_code not in UNTOUCHED else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.at:
                self.act()
        return self._line

    def points(self) -> list[int]:
        """The first and the last time of each line; all times in the deep profile."""
        if DEEP:
            return list(range(len(self.seen)))
        first = {line: n for n, line in reversed(list(enumerate(self.seen)))}
        return sorted({*first.values(), *{line: n for n, line in enumerate(self.seen)}.values()})


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("verb", VERBS | CHECKS)
def test_ctrl_c_at_any_line_leaves_the_model_bitwise_what_it_was(verb: str) -> None:
    make, call = (VERBS | CHECKS)[verb]
    new, model = make(), make()
    call(new)  # what is cached stays cached while this one lives
    with Lines() as lines:
        call(model)
    points, model, late = lines.points(), make(), 0
    most = len(points) if DEEP else 24 if verb.startswith(("apply", "certify")) else 60
    before = Look(model)
    for at in points[:: -(-len(points) // most)]:
        with suppress(KeyboardInterrupt), Lines(at, interrupt) as lines:
            call(model)
            assert len(lines.seen) <= at, "Ctrl-C was swallowed"
        if not before.same(model):  # it came on the way out of the verb, when all was done
            assert whole(model) == whole(new)
            assert verb.startswith("apply") or reference.same_bits(reference.bits(model), reference.bits(new))
            late += 1
            model = make()
            before = Look(model)
    assert late < 20, "of hundreds"


def test_an_exception_leaves_torchs_switches_as_they_were() -> None:
    before = switches()
    with pytest.raises(KeyboardInterrupt), changes.changing(small(), "apply"):
        torch.set_grad_enabled(False)  # as an exception in the `__exit__` of a `torch.no_grad()` leaves it
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        raise KeyboardInterrupt
    assert switches() == before


class ShortOfMemory(TorchDispatchMode):
    """The nth operation that needs memory finds none; from the nth on none does, where it `lasts`."""

    def __init__(self, at: int = -1, lasts: bool = False) -> None:
        super().__init__()
        self.at, self.lasts, self.seen = at, lasts, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(argument.alias_info for argument in func._schema.arguments):  # neither in place nor a view
            self.seen += 1
            if self.seen - 1 == self.at or (self.lasts and self.seen > self.at >= 0):
                raise torch.OutOfMemoryError("no memory, says the test")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("verb", VERBS | CHECKS)
def test_no_memory_at_any_operation_leaves_the_model_bitwise_what_it_was(verb: str) -> None:
    make, call = (VERBS | CHECKS)[verb]
    model = make()
    with ShortOfMemory() as mode:
        call(model)
    total, new, model = mode.seen, reference.bits(model), make()
    before = Look(model)
    step = 1 if DEEP else 131 if verb.startswith(("apply", "certify")) else 29 if "GPU" in verb else 3
    for at in range(0, total, step):
        try:
            with ShortOfMemory(at):
                call(model)
        except (torch.OutOfMemoryError, LoraFxError) as error:
            assert "no memory" in str(error)
            assert before.same(model), at
        else:  # a part of a weight with nothing to be lost yet was folded in halves
            folds = verb.startswith(("fold", "switch")) or verb == "certify, folded"  # which folds once more at the end
            assert folds and reference.same_bits(reference.bits(model), new)
            model = make()
            before = Look(model)


# ── a final fold too large to keep a way back ────────────────────────────────────────────────────────────────────────


def test_a_large_final_fold_goes_on_in_smaller_pieces_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    template = adapted()
    expected = reference.bits(lora_fx.fold(template, copy=True, final=True))
    finished = 0
    for at in range(10**6):
        model = copy.deepcopy(template)
        before = Look(model)
        with ShortOfMemory(at) as mode:
            try:
                lora_fx.fold(model, final=True)
            except torch.OutOfMemoryError:  # it had not begun to write
                assert before.same(model)
                continue
        finished += 1
        assert reference.same_bits(reference.bits(model), expected)
        if mode.seen <= at:
            break
    assert finished > 10


def test_a_large_final_fold_that_finds_no_memory_at_all_says_that_it_is_half_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    real, calls = ExactSum.rounded, []

    def none_left(part: ExactSum, *rest: Any) -> torch.Tensor:
        calls.append(part)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(part, *rest)

    monkeypatch.setattr(ExactSum, "rounded", none_left)
    with pytest.raises(FoldError, match="ended before it was whole: no memory") as caught:
        lora_fx.fold(adapted(), final=True)
    assert caught.value.place == "Small" and "load the base weights again" in caught.value.remedy
    assert len(calls) == 2 + 3, "blocks of 11 rows: 11, 5, 2 and 1 of them"


def test_ctrl_c_waits_for_the_end_of_a_large_final_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a pytest worker may have another
    template = adapted()
    expected = reference.bits(lora_fx.fold(template, copy=True, final=True))
    model = copy.deepcopy(template)
    with Lines() as lines:
        lora_fx.fold(model, final=True)
    outcomes = set()
    for at in lines.points() if DEEP else lines.points()[::3]:
        model = copy.deepcopy(template)
        before = Look(model)
        with pytest.raises(KeyboardInterrupt), Lines(at, lambda: signal.raise_signal(signal.SIGINT)):
            lora_fx.fold(model, final=True)
        old, new = before.same(model), reference.same_bits(reference.bits(model), expected)
        assert old != new
        outcomes.add(old)
    assert outcomes == {True, False}
    assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler


def test_a_change_that_cannot_be_undone_says_so() -> None:
    model = adapted()

    def fail() -> None:
        raise torch.OutOfMemoryError("still none")

    error = pytest.raises(LoraFxError, match="undoing it failed too: still none")
    with error as caught, changes.changing(model, "a test") as undo:
        undo.append(fail)
        raise KeyboardInterrupt
    assert caught.value.place == "the model" and "load them again" in caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.1, 1e6], ids=["exceptions", "steps", "numbers"])
def test_a_fold_is_undone_in_halves_too(dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the ways in which a remainder is kept, cut in the middle of rows of odd length."""
    torch.manual_seed(0)
    layer = lora_fx.apply(nn.Linear(7, 23, bias=False).to(dtype), Rule(where="*", rank=2), check=False)
    reference.fill(layer)
    with torch.no_grad():
        layer.weight_lora_default.B.mul_(size)
    before, real, folding_ = Look(layer), Tile.delta, [True]

    def short(part: ExactSum, *rest: Any) -> torch.Tensor:
        delta = real(part, *rest)
        if not folding_ and len(delta) > 3:
            raise torch.OutOfMemoryError("no memory")
        return delta

    def stop(*_: Any) -> None:
        folding_.clear()
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Tile, "delta", short)
    monkeypatch.setattr(folding, "_put_away", stop)
    with pytest.raises(torch.OutOfMemoryError):
        lora_fx.fold(layer)
    assert before.same(layer)


def test_an_error_that_is_not_ours_says_that_the_verb_is_undone() -> None:
    model = adapted()
    with pytest.raises(torch.OutOfMemoryError) as caught, ShortOfMemory(30):
        lora_fx.fold(model)
    assert caught.value.__notes__ == ["lora_fx has undone this fold: the model is bitwise what it was."]


# ── a process of its own ─────────────────────────────────────────────────────────────────────────────────────────────

ELSEWHERE = pytest.mark.xdist_group("elsewhere")  # so that one server is started


def folds_short_of_memory() -> list[str]:
    """Fold with less and less address space to be had, until it fails and after."""
    torch.set_num_threads(1)
    exact_sum._BLOCK = 2**22  # two of the first weight's rows: blocks that the allocator asks the system for
    model = nn.Sequential(nn.Linear(2**21, 2, bias=False), nn.Linear(2, 2**19, bias=False))
    lora_fx.apply(model, Rule(where="*", rank=2), torch.randn(1, 2**21), check=False)
    reference.fill(model)
    before, found = Look(model), []
    for room in (1024, *range(224, 0, -32)):  # MiB
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room * 2**20, resource.RLIM_INFINITY))
        try:
            lora_fx.fold(model)
            found.append("folded")
        except (RuntimeError, MemoryError, LoraFxError) as error:
            found.append(str(error))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if found[-1] == "folded":
            lora_fx.unfold(model)
            before = Look(model) if len(found) == 1 else before
        assert len(found) == 1 or reference.same_bits(before.bits(model), before.numbers)
    return found


@ELSEWHERE
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set from /proc/self/statm")
def test_a_fold_that_really_runs_out_of_memory() -> None:
    found = elsewhere(folds_short_of_memory)
    assert found[0] == "folded"
    assert any("there is no room on cpu to fold one row" in error for error in found)
    assert "can't allocate memory" in found[-1]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_TOUCHES = frozenset({
    "open", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir",
    "shutil.rmtree", "shutil.copytree", "shutil.copyfile", "ctypes.dlsym",
})  # fmt: skip


def die_at(n: int, folder: str) -> None:
    """From now on, kill -9 this process before it touches a file in the folder for the nth time."""
    touched, fsync = [0], os.fsync

    def touch(event: str, arguments: tuple[Any, ...]) -> None:
        mine = event == "ctypes.dlsym" or any(folder in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes))
        if event in _TOUCHES and mine:
            touched[0] += 1
            if touched[0] > n:
                os.kill(os.getpid(), signal.SIGKILL)

    def sync(handle: int) -> None:
        touch("open", (folder,))
        fsync(handle)

    os.fsync = sync
    sys.addaudithook(touch)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(child: int) -> bool:
    """Whether the fork was killed; if not, it came to its end."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def two_layers(rank: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    return lora_fx.apply(model, Rule(where="*", rank=rank), check=False) if rank else model


def saves_killed(place: str, beside: bool, peft: bool) -> list[int]:
    """Save a new adapter over an old one, killed at every touch of a file. How often the old, the new one was there."""
    torch.set_num_threads(1)
    folder, found, configs = Path(place) / "a", [0, 0], []
    others = {"README.md": b"mine", "deep/er/notes.txt": b"mine too"} if beside else {}
    for name, data in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for rank in (2, 1):
        lora_fx.save_adapter(two_layers(rank), folder, peft=peft)
        configs.insert(0, contents(folder)[CONFIG])
    for n in range(10**6):
        child = os.fork()
        if not child:
            die_at(n, place)
            try:
                lora_fx.save_adapter(two_layers(2), folder, peft=peft)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        over = not killed(child)
        loaded = lora_fx.load_adapter(two_layers(), place, check=False)  # the only one in there: the rest is hidden
        (rank,) = {adapter.rank for adapter in reference.distinct_adapters(loaded)}
        which, now = rank - 1, contents(folder)
        found[which] += 1
        assert now.pop(CONFIG) == configs[which] and now.pop(TENSORS) and now == others
        if over:
            return found
        if which:
            lora_fx.save_adapter(two_layers(1), folder, peft=peft)
    raise AssertionError


@ELSEWHERE
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each kill is of a fork")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with other files"])
@pytest.mark.parametrize("peft", [False, True], ids=["one file differs", "both files differ"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_adapter_or_the_new_one(
    beside: bool, peft: bool, tmp_path: Path
) -> None:
    old, new = elsewhere(saves_killed, str(tmp_path), beside, peft)
    assert old >= 5 and new >= 3


class Finished(Exception):
    pass


def exports_killed(place: str, external: bool) -> list[int]:
    """Export a new model over an old one, killed at every touch of a file once it is translated."""
    from lora_fx.export.onnx import export as onnx_export

    torch.set_num_threads(1)
    path, found, me, real = Path(place) / "m.onnx", [0, 0], os.getpid(), onnx_export.folder_beside
    models = [nn.Linear(40, 30), nn.Linear(40, 30)]
    x = torch.randn(2, 40)
    lora_fx.export_onnx(models[0], x, path, external_data=external)
    before = contents(path.parent)

    @contextmanager
    def forked(target: Path) -> Iterator[Path]:
        for n in range(10**6):
            child = os.fork()
            if not child:
                die_at(n, place)
                with real(target) as folder:
                    yield folder
                return
            over = not killed(child)
            found[which_model(path, models)] += 1
            if over:
                stale = [name for name in contents(path.parent) if name.startswith("m.onnx.") and "/" not in name]
                assert stale == ["m.onnx.data"] * external
                raise Finished
            for name, data in before.items():
                (path.parent / name).write_bytes(data)

    onnx_export.folder_beside = forked
    try:
        lora_fx.export_onnx(models[1], x, path, external_data=external)
    except Finished:
        return found
    finally:
        if os.getpid() != me:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    raise AssertionError


def which_model(path: Path, models: list[nn.Module]) -> int:
    """The model whose weights the file holds, all of them."""
    import onnx

    tensors = onnx.load(path).graph.initializer  # with what lies in files beside it
    numbers = {tuple(t.dims): onnx.numpy_helper.to_array(t).tobytes() for t in tensors}
    own = [{tuple(p.shape): p.detach().numpy().tobytes() for p in model.parameters()} for model in models]
    return own.index(numbers)


@ELSEWHERE
@pytest.mark.onnx
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each kill is of a fork")
@pytest.mark.parametrize("external", [False, True], ids=["one file", "two files"])
def test_a_kill_at_any_moment_of_an_export_leaves_the_old_model_or_the_new_one(external: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    old, new = elsewhere(exports_killed, str(tmp_path), external)
    assert old >= 3 and new >= 3


def writes_without_room(place: str, limit: int) -> list[list[str]]:
    """Save and export where files may have no more than so many bytes; 0: where the disk has no more."""
    torch.set_num_threads(1)
    folder, path = Path(place) / "a", Path(place) / "m.onnx"
    model, big = adapted(), lora_fx.apply(nn.Linear(300, 400), Rule(where="*", rank=80), torch.randn(2, 300))
    lora_fx.save_adapter(model, folder, name="one", peft=False)
    lora_fx.export_onnx(nn.Linear(4, 3), torch.randn(2, 4), path, external_data=True)
    before, found = contents(Path(place)), []
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for call in (
        lambda: lora_fx.save_adapter(big, folder, peft=False),
        lambda: lora_fx.save_adapter(big, Path(place) / "new", peft=False),
        lambda: lora_fx.export_onnx(big, torch.randn(2, 300), path),
        lambda: lora_fx.export_onnx(big, torch.randn(2, 300), path, external_data=True),
    ):
        try:
            call()
            found.append(["nothing"])
        except (FileError, ExportError) as error:
            found.append([error.reason, error.place, error.remedy])
        assert contents(Path(place)) == before
    return found


def assert_no_room(found: list[list[str]], place: Path, reason: str) -> None:
    places = [place / "a", place / "new", place / "m.onnx", place / "m.onnx"]
    for (why, where, remedy), expected in zip(found, places, strict=True):
        assert (
            "cannot be written" in why
            and reason in why
            and where == str(expected)
            and "another path" in (remedy if where.endswith("onnx") else "another path")
        )
        assert remedy


@ELSEWHERE
@pytest.mark.onnx
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system limits no file sizes")
def test_files_that_may_not_grow_leave_the_old_ones(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    assert_no_room(elsewhere(writes_without_room, str(tmp_path), 20_000), tmp_path, "File too large")


@ELSEWHERE
@pytest.mark.onnx
def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "lora_fx", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small disk can be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    try:
        assert_no_room(elsewhere(writes_without_room, str(tmp_path), 0), tmp_path, "No space left")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ── what a folder may make us do ─────────────────────────────────────────────────────────────────────────────────────


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", [TENSORS, adapter_folder.PICKLE])
def test_loading_never_runs_what_a_pickle_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's reader of weights alone may open one, and that only where the name says that it is one."""
    monkeypatch.chdir(tmp_path)
    lora_fx.save_adapter(two_layers(1), tmp_path / "a")
    (tmp_path / "a" / TENSORS).unlink()
    torch.save(Bomb(), tmp_path / "a" / name)
    opened, read = [], torch.load

    def weights(*args: Any, weights_only: bool, **options: Any) -> Any:
        opened.append(weights_only)
        return read(*args, weights_only=weights_only, **options)

    monkeypatch.setattr(torch, "load", weights)
    for module in (pickle, pickle._Unpickler):
        monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("it was opened as a pickle"))
    model = two_layers()
    before = Look(model)
    with pytest.raises(FileError) as caught:
        lora_fx.load_adapter(model, tmp_path / "a")
    assert name in caught.value.place and caught.value.remedy and not (tmp_path / "exploded").exists()
    assert before.same(model) and opened == [True] * (name == adapter_folder.PICKLE)


@functools.cache
def _listeners() -> list[list[str]]:
    """Lists that get the paths of all files that are opened. Nothing takes such a hook off again: there is one."""
    lists: list[list[str]] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and lists and isinstance(arguments[0], str | bytes):
            for paths in lists:
                paths.append(os.fsdecode(arguments[0]))

    sys.addaudithook(watch)
    return lists


@contextmanager
def opened() -> Iterator[list[str]]:
    """The paths of the files that are opened meanwhile."""
    paths: list[str] = []
    _listeners().append(paths)
    try:
        yield paths
    finally:
        _listeners().remove(paths)


@pytest.mark.parametrize(
    "key", ["../../x", "/etc/passwd", "a\0b", "C:\\x", "..", "base_model.model.../../x.lora_A.weight"]
)
def test_names_in_a_file_are_never_paths(key: str, tmp_path: Path) -> None:
    lora_fx.save_adapter(two_layers(1), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / TENSORS)
    save_file({**tensors, key: torch.ones(2, 3)}, tmp_path / "a" / TENSORS)
    model = two_layers()
    before = Look(model)
    with opened() as paths, pytest.raises(FileError, match="no layer") as caught:
        lora_fx.load_adapter(model, tmp_path / "a")
    assert key in caught.value.place and before.same(model)
    assert {path for path in paths if not path.endswith((".py", ".pyc"))} <= {
        str(tmp_path / "a" / name) for name in (CONFIG, TENSORS)
    }


def test_files_may_be_links_as_in_the_cache_of_a_hub_and_are_never_written_through(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    lora_fx.save_adapter(two_layers(1), blobs)
    snapshot.mkdir()
    for name in (CONFIG, TENSORS):
        (snapshot / name).symlink_to(Path("..") / "blobs" / name)
    before = contents(blobs)
    lora_fx.load_adapter(two_layers(), snapshot)
    lora_fx.save_adapter(two_layers(2), snapshot)
    assert contents(blobs) == before
    assert not any((snapshot / name).is_symlink() for name in (CONFIG, TENSORS))
    assert {a.rank for a in reference.distinct_adapters(lora_fx.load_adapter(two_layers(), snapshot))} == {2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    lora_fx.save_adapter(two_layers(1), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    with pytest.raises(FileError, match=r"no regular file|it has no adapter_config"):
        lora_fx.load_adapter(two_layers(), tmp_path / "a")
