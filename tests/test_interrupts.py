"""Signals wait while a verb runs, and end it at a safe point. (`python -m tests.interrupts`: 2,000 of them.)"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule, changes
from lora_fx.changes import foreign, safe_point, signals_wait, uninterrupted
from lora_fx.model.inventory import inventory
from tests import interrupts
from tests.test_faults import Look, adapted

FIRST, SECOND = signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A pytest worker may have others."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, FIRST, SECOND)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def handled_by(handler: Callable[[int], Any], *numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, lambda n, frame: handler(n))


def failing(number: int) -> None:
    raise TimeoutError(str(number))


def test_interrupts_at_random_moments_leave_everything_old_or_new() -> None:
    names = ("capture", "apply", "certify", "fold", "unfold", "save_adapter")
    verbs = [verb for verb in interrupts.VERBS if verb.name in names]
    outcomes = list(interrupts.interrupts(verbs, 24, seed=1))
    assert not [outcome for outcome in outcomes if outcome.broken]
    assert {outcome.moment for outcome in outcomes} == {"time", "line", "bytecode"}


def test_what_is_looked_at_after_an_interrupt_shows_what_is_left_patched() -> None:
    before = interrupts.world(True)
    assert interrupts.world(True) == before and not interrupts.trouble_with_torch()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    handler = signal.signal(FIRST, signal.SIG_IGN)
    with torch.no_grad(), changes.FAST_PATHS.set_for_now(False), torch.device("meta"):
        torch.rand(1, device="cpu")
        after = interrupts.world(True)
        assert interrupts.trouble_with_torch()
    hook.remove()
    signal.signal(FIRST, handler)
    different = {what for what, was in before.items() if was != after[what]}
    assert different == {"switches", "modes", "hooks", "handlers", "random state"}


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_signals_wait_for_the_end_of_the_outermost_block_and_come_in_their_order() -> None:
    came: list[int] = []
    handled_by(came.append, FIRST, SECOND)
    with signals_wait():
        with signals_wait():
            for number in (SECOND, FIRST, SECOND):
                signal.raise_signal(number)
        assert not came
    assert came == [SECOND, FIRST]
    signal.raise_signal(FIRST)
    assert came == [SECOND, FIRST, FIRST]


def test_they_come_at_a_safe_point_but_where_there_is_none() -> None:
    came: list[int] = []
    handled_by(came.append, FIRST)
    with signals_wait():
        with uninterrupted():
            signal.raise_signal(FIRST)
            safe_point()
            assert not came
        assert not came
        safe_point()
        assert came == [FIRST]
        safe_point()
    assert came == [FIRST]


def test_no_exception_is_lost() -> None:
    handled_by(failing, FIRST, SECOND)
    with pytest.raises(TimeoutError, match=str(int(SECOND))) as caught, signals_wait():
        signal.raise_signal(FIRST)
        signal.raise_signal(SECOND)
        raise ValueError("in flight")
    error = caught.value
    assert isinstance(error.__context__, TimeoutError) and str(error.__context__) == str(int(FIRST))
    assert isinstance(error.__context__.__context__, ValueError)


def test_a_handler_that_is_set_meanwhile_stays_and_the_others_are_back() -> None:
    def mine(number: int, frame: Any) -> None: ...

    handled_by(failing, FIRST, SECOND)
    other = signal.getsignal(SECOND)
    with signals_wait():
        signal.signal(FIRST, mine)
    assert (signal.getsignal(FIRST), signal.getsignal(SECOND)) == (mine, other)


def test_handlers_that_raise_while_they_are_put_in_place_and_given_back() -> None:
    """From some moment on a signal every 50 µs: at each place at which Python looks for one, again and again."""
    armed, raised, entered, draw = False, 0, 0, random.Random(0)

    def fail(number: int) -> None:
        if armed:
            raise TimeoutError

    numbers = (signal.SIGINT, signal.SIGALRM, FIRST)
    handled_by(fail, signal.SIGALRM, FIRST)
    handlers = [signal.getsignal(number) for number in numbers]
    for _ in range(400):
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + 5e-4 * draw.random(), 5e-5)
        try:
            armed = True
            with signals_wait():
                entered += 1
                with signals_wait(), uninterrupted():
                    pass
            armed = False
        except TimeoutError:
            armed = False
            raised += 1
        assert (changes._signals.waits, changes._signals.shut) == (0, 0)
        with signals_wait():
            pass  # where several came at once, it takes out, and lets in, what the last one could not
        assert [signal.getsignal(number) for number in numbers] == handlers and not changes._signals.arrived
    assert raised > 20 and entered > 20


def test_other_threads_have_no_signals_to_wait_for() -> None:
    came: list[int] = []
    handled_by(came.append, FIRST)
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        with signals_wait(), uninterrupted(), foreign():
            inside.set()
            go_on.wait(60)
            safe_point()

    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(60)
    signal.raise_signal(FIRST)
    assert came == [FIRST]
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()


def test_the_third_ctrl_c_does_not_wait_and_says_what_that_means() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, signals_wait():
        with uninterrupted():
            for _ in range(5):
                signal.raise_signal(signal.SIGINT)
        safe = False
        try:
            safe_point()
        except KeyboardInterrupt as error:
            safe = not hasattr(error, "__notes__")
        assert safe
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waits")
    assert "start a new process" in caught.value.__notes__[0]
    with pytest.raises(KeyboardInterrupt) as caught, signals_wait():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert not hasattr(caught.value, "__notes__")


# ── in the verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────


ENDED = threading.Event()  # a list or an attribute would be put back


class Catches(nn.Module):
    """A signal comes in its forward, which takes any `Exception` for its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.one, self.two = number, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            signal.raise_signal(self.number)
            x = self.one(x)
        except Exception:
            x = torch.relu(self.one(x))
        ENDED.set()
        return self.two(x)


@pytest.mark.parametrize("verb", ["capture", "apply", "verify"])
def test_what_a_handler_raises_is_not_taken_for_the_models_own_error(verb: str) -> None:
    handled_by(failing, FIRST)
    model = Catches(FIRST)
    before, x = Look(model), torch.randn(5, 3)
    calls: dict[str, Callable[[], Any]] = {
        "capture": lambda: lora_fx.capture(model, x),
        "apply": lambda: lora_fx.apply(model, Rule(where="*", rank=2), x),
        "verify": lambda: lora_fx.verify(model, model, x),
    }
    ENDED.clear()
    with pytest.raises(TimeoutError, match=str(int(FIRST))):
        calls[verb]()
    assert ENDED.is_set() == (verb == "verify"), "what torch records stops at the next operation"
    assert before.same(model) and not interrupts.trouble_with_torch()


def test_a_handler_that_does_not_raise_ends_nothing() -> None:
    came: list[int] = []
    handled_by(came.append, FIRST)
    model = Catches(FIRST)
    lora_fx.apply(model, Rule(where="*", rank=2), torch.randn(5, 3))
    assert lora_fx.adapters(model) and came


def test_an_interrupted_verb_says_that_it_is_undone_up_to_its_end() -> None:
    model = adapted()
    before = Look(model)
    with pytest.raises(KeyboardInterrupt) as caught, changes.changing(model, "fold"):
        lora_fx.fold(model)
        signal.raise_signal(signal.SIGINT)
    assert caught.value.__notes__ == ["lora_fx has undone this fold: the model is bitwise what it was."]
    assert before.same(model)


def test_who_waits_for_another_threads_verb_can_be_interrupted() -> None:
    model, inside, go_on = adapted(), threading.Event(), threading.Event()

    def hold() -> None:
        with changes.in_turn():
            inside.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    handled_by(failing, signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(TimeoutError):
        lora_fx.fold(model)
    assert thread.is_alive() and not inventory(model).folded
    go_on.set()
    thread.join(60)
    lora_fx.fold(model)
