"""Threads: forwards together give the bits of one alone; no verb changes a model while a forward of it runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental import proxy_tensor

import lora_fx
from lora_fx import LoraFxError, Rule, changes
from lora_fx.errors import FoldError
from lora_fx.model.inventory import inventory
from tests import reference

LIMIT = 60.0  # seconds after which a thread that waits is a failure


class Net(nn.Module):
    """`up` is rewritten as a graph, `side` dispatches, `head` is one use of a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.side = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.up(self.table(ids)))
        x = x + F.linear(x, self.side.weight) if x.is_contiguous() else x
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


IDS = torch.arange(12).reshape(2, 6)
RULES = [Rule(form="linear", where="head", rank=2, alpha=3), Rule(where="up | side | attention.*", rank=3, alpha=5)]


def adapted(*names: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for name in names or ("one",):
        lora_fx.apply(model, RULES, IDS, name=name, check=False)
    reference.fill(model)
    return lora_fx.activate(model, (names or ("one",))[0])


def started(*works: Callable[[], Any]) -> list[BaseException]:
    """Run them at once, each in a thread of its own; what they raised."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> None:
        try:
            ready.wait(LIMIT)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "it hangs"
    return errors


def test_captures_take_turns():
    """What is patched while torch traces is what it was afterwards, whichever capture ends first."""
    second, first_ended = threading.Event(), threading.Event()

    class Waiting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.out_features == 1:
                second.wait(0.5)
            else:
                second.set()
                first_ended.wait(0.5)
            return super().forward(x)

    def first() -> None:
        lora_fx.capture(Waiting(3, 1), torch.ones(2, 3))
        first_ended.set()

    before = proxy_tensor.extract_val, fx.proxy.TracerBase.create_node, nn.Module.__call__
    assert not started(first, lambda: lora_fx.capture(Waiting(3, 2), torch.ones(2, 3)))
    assert (proxy_tensor.extract_val, fx.proxy.TracerBase.create_node, nn.Module.__call__) == before


# ── forwards together ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("form", ["adapted", "folded", "folded for good", "two adapters"])
def test_threads_get_the_bits_of_one(form: str, threads: int) -> None:
    model = adapted("one", "two") if form == "two adapters" else adapted()
    if form == "two adapters":
        lora_fx.activate(model, "one", "two")
    elif form != "adapted":
        lora_fx.fold(model, final=form == "folded for good")
    inputs = [(IDS + n) % 13 for n in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for n in [*range(8), *range(7, -1, -1)]:
                if not torch.equal(model(inputs[n]), expected[n]):
                    wrong.append(n)

    assert not started(*[work] * threads) and not wrong


def test_threads_get_the_gradients_of_one() -> None:
    model = adapted()
    models = [copy.deepcopy(model) for _ in range(2)]

    def gradients(own: nn.Module) -> dict[str, torch.Tensor]:
        torch.set_num_threads(1)  # a new thread has the default: sums would be split otherwise
        own(IDS).square().sum().backward()
        return {name: p.grad for name, p in own.named_parameters() if p.grad is not None}

    expected, found = gradients(model), {}
    works = [lambda n=n, own=own: found.update({n: gradients(own)}) for n, own in enumerate(models)]
    assert not started(*works) and len(found) == 2
    assert all(reference.same_bits(g, expected) for g in found.values())


# ── a verb while a forward runs ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def inside_a_forward(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Another thread, named `server`, is inside the forward of `module` while the block runs."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(LIMIT)

    def serve() -> None:
        with torch.no_grad():
            model(IDS)

    handle = module.register_forward_pre_hook(wait)
    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        assert inside.wait(LIMIT)
        yield
    finally:
        go_on.set()
        thread.join(LIMIT)
        handle.remove()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    lora_fx.save_adapter(adapted("file"), folder, name="file", peft=False)
    return folder


VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], Any]]] = {
    "fold": (adapted, lambda model, _: lora_fx.fold(model)),
    "unfold": (lambda: lora_fx.fold(adapted()), lambda model, _: lora_fx.unfold(model)),
    "switch": (lambda: lora_fx.fold(adapted("one", "two")), lambda model, _: lora_fx.switch(model, "two")),
    "activate": (lambda: adapted("one", "two"), lambda model, _: lora_fx.activate(model, "two")),
    "remove": (adapted, lambda model, _: lora_fx.remove(model, "one")),
    "apply": (adapted, lambda model, _: lora_fx.apply(model, RULES, IDS, name="new")),
    "load_adapter": (adapted, lambda model, folder: lora_fx.load_adapter(model, folder, IDS)),
    "export_onnx": (adapted, lambda model, folder: lora_fx.export_onnx(model, IDS, folder / "m.onnx")),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_refused_while_a_thread_is_inside_a_forward(verb: str, saved: Path) -> None:
    if verb == "export_onnx":
        pytest.importorskip("onnxscript")
    make, call = VERBS[verb]
    model = make()
    with inside_a_forward(model, model.attention):
        before, classes = reference.bits(model), reference.classes(model)
        with pytest.raises(LoraFxError, match=verb) as caught:
            call(model, saved)
        assert "thread 'server'" in caught.value.reason and "MultiheadAttention" in caught.value.reason
        assert caught.value.place == "attention" and "wait until" in caught.value.remedy
        assert reference.same_bits(reference.bits(model), before) and reference.classes(model) == classes
    if verb != "export_onnx":
        call(model, saved)  # the forward has returned: now it may


def test_a_part_and_a_whole_of_what_runs() -> None:
    """The forward of a module around the model may come back to the model; that of a part reads it right now."""
    inner, outer = adapted(), nn.Sequential(adapted(), nn.Identity())
    with inside_a_forward(outer, outer[1]), pytest.raises(LoraFxError, match="'server'") as caught:
        lora_fx.fold(outer[0])
    assert caught.value.place == "a module around the model" and "Sequential" in caught.value.reason
    with inside_a_forward(inner, inner), pytest.raises(LoraFxError, match="Net") as caught:
        lora_fx.fold(inner)
    assert caught.value.place == "the model"
    with inside_a_forward(outer[0], outer[0].up):
        lora_fx.fold(inner)  # another model
        copied = lora_fx.fold(outer[0], copy=True)  # the model itself stays as it is
    assert lora_fx.verify(outer[0], copied, IDS)


def test_a_verb_in_the_models_own_forward_is_refused() -> None:
    model = adapted()
    handle = model.up.register_forward_hook(lambda *_: lora_fx.fold(model))
    with pytest.raises(LoraFxError, match="fold would change the model while this thread is inside") as caught:
        model(IDS)
    handle.remove()
    assert caught.value.place == "up" and "not in it or in a hook" in caught.value.remedy
    assert lora_fx.adapters(model) and not inventory(model).folded


def test_a_verb_in_the_self_check_of_another_is_refused_and_both_are_undone() -> None:
    model = adapted()
    names = list(model.state_dict())
    handle = model.up.register_forward_hook(lambda *_: lora_fx.remove(model, "one"))
    with pytest.raises(LoraFxError, match="remove would change the model while this thread"):
        lora_fx.apply(model, RULES, IDS, name="two")
    handle.remove()
    assert list(model.state_dict()) == names


def test_a_forward_may_change_a_model_that_it_holds() -> None:
    """A module that routes: it chooses the adapter, then calls the model."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted("one", "two")

        def forward(self, name: str) -> torch.Tensor:
            return lora_fx.activate(self.model, name)(IDS)

    router = Router()
    one, two = router("one"), router("two")
    assert torch.equal(router("one"), one) and not torch.equal(one, two)


# ── verbs together ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_verbs_of_two_threads_wait_for_each_other() -> None:
    """One of two folds and unfolds of the same model at once finds what the other left, never a half of it."""
    model = adapted()
    before = reference.bits(model)
    refused: list[FoldError] = []

    def work() -> None:
        for _ in range(20):
            lora_fx.fold(model)
            try:
                lora_fx.unfold(model)
            except FoldError as error:  # the other one has unfolded it
                refused.append(error)

    assert not started(work, work)
    assert reference.same_bits(reference.bits(model), before)
    assert all("not folded" in error.reason for error in refused)


def test_a_verb_waits_until_another_models_verb_is_done() -> None:
    first, second = adapted(), adapted()
    order: list[str] = []
    with changes.alone(first, "a test"):
        thread = threading.Thread(target=lambda: (lora_fx.fold(second), order.append("second")))
        thread.start()
        order.append("first")
    thread.join(LIMIT)
    assert order == ["first", "second"] and not thread.is_alive()
    assert inventory(second).folded


def test_models_of_several_threads_are_adapted_at_once() -> None:
    models = [Net().eval() for _ in range(4)]
    alone = copy.deepcopy(models[0])
    works = [lambda model=model: lora_fx.apply(model, RULES, IDS) for model in models]
    assert not started(*works)
    lora_fx.apply(alone, RULES, IDS)
    assert all(reference.classes(model) == reference.classes(alone) for model in models)
