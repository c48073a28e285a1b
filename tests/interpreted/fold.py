"""The kernels of a fold against torch's route and against fractions."""

from __future__ import annotations

import copy
import math
import sys
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import exact_sum, fold_kernels, fused_sum
from lora_fx.deltas.exact_sum import Way
from lora_fx.deltas.fused_sum import FOLDS, FusedSum, FusedWay
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.rounding import INTEGERS, nearest
from lora_fx.errors import FoldError
from lora_fx.graph.layout import Layout
from lora_fx.model.inventory import inventory
from lora_fx.passes import fold as folding
from lora_fx.passes.fold import kept_bytes
from tests import reference
from tests.waits import Waits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # NumPy's, of numbers that overflow

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """They fold what is on a CPU, too."""
    monkeypatch.setitem(FOLDS.decided, CPU, True)
    monkeypatch.setattr(fold_kernels, "ROWS", 64)  # fewer programs: the interpreter is slow
    for name in ("fold", "put"):
        monkeypatch.setattr(fold_kernels, name, Interpreted(getattr(fold_kernels, name)))


class Interpreted:
    """The interpreter copies what it is given, with operations that no card needs: they are not seen."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*args, **options):
            with _disable_current_modes():
                self.kernel[grid](*args, **options)

        return call


def without_kernels(model: nn.Module, verb, **options) -> nn.Module:
    """The same by torch's route."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FOLDS.decided, CPU, False)
        return verb(model, **options)


def layer(dtype: torch.dtype, out: int, inner: int, rank: int = 3, fill: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(inner, out, bias=False).to(dtype)
    lora_fx.apply(model, Rule(where="*", rank=rank, alpha=5), torch.randn(2, inner).to(dtype), check=False)
    if fill:
        reference.fill(model)
    return model


def way_of(model: nn.Module) -> Way:
    return next(way for record in inventory(model).records.values() for way in record.ways.values())


class Forms(nn.Module):
    """Weights whose outputs come first, or their inputs; and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 12), nn.Linear(6, 66)
        self.back = nn.Parameter(torch.randn(12, 4))
        self.experts = nn.Parameter(torch.randn(3, 17, 4))
        self.mix = nn.Parameter(torch.randn(3, 17, 6))

    def forward(self, i):
        x = torch.tanh(self.embed(i) @ self.back)
        y = x @ self.experts.transpose(1, 2)
        return self.head((y @ self.mix).sum(0))


IDS = torch.arange(4)


def forms(dtype: torch.dtype, names: tuple[str, ...] = ("default",)) -> nn.Module:
    torch.manual_seed(0)
    model = Forms().to(dtype)
    for rank, name in enumerate(names, 2):
        lora_fx.apply(model, Rule(where="*", rank=rank, alpha=5), IDS, name=name, check=False)
    lora_fx.activate(model, *names)
    reference.fill(model)
    return model


@pytest.mark.parametrize("names", [("default",), ("one", "two")], ids=["one", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_folds_to_the_bits_of_torchs_route_and_back(dtype, names):
    model = forms(dtype, names)
    state, plain = reference.bits(model), without_kernels(copy.deepcopy(model), lora_fx.fold)
    lora_fx.fold(model)
    ways = {name: way for record in inventory(model).records.values() for name, way in record.ways.items()}
    assert len(ways) == 4 and all(isinstance(way, FusedWay) for way in ways.values())  # two are called `weight`
    assert reference.same_bits(reference.bits(model), reference.bits(plain))
    assert kept_bytes(model) <= kept_bytes(plain)
    moved = copy.deepcopy(model)
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)
    assert reference.same_bits(reference.bits(without_kernels(moved, lora_fx.unfold)), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "near ties", "cancelling"])
def test_every_folded_element_is_the_real_sum_rounded_once(dtype, kind):
    """Against fractions: an oracle with no rounding in it at all."""
    model = layer(dtype, 18, 40)
    adapter = model.weight_lora_default
    with torch.no_grad():
        if kind == "near ties":  # W + half a step, give or take what only many bits can see
            model.weight.copy_((1 + torch.rand(18, 40)).to(dtype))
            adapter.A[0], adapter.B[:, 0] = torch.finfo(dtype).eps / 2, 0.6  # the scale is 5/3
            adapter.A[1:] *= 2.0**-45
        elif kind == "cancelling":
            model.weight.copy_(-(adapter.delta(model._parameters["weight"]) * (1 + 1e-3 * torch.rand(18, 40))))
    W, A, B = ([[Fraction(x) for x in row] for row in t.tolist()] for t in (model.weight, adapter.A, adapter.B))
    state = reference.bits(model)
    lora_fx.fold(model)
    assert isinstance(way_of(model), FusedWay) or (kind == "near ties" and dtype == torch.float32)  # much in doubt
    for o, row in enumerate(model.weight.tolist()):
        exact = [W[o][i] + Fraction(adapter.scale) * sum(B[o][k] * A[k][i] for k in range(3)) for i in range(40)]
        assert row == [nearest(x, dtype) for x in exact]
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_every_size_are_rounded_once(dtype):
    """From the smallest to the largest, to both sides of what lies between two; W is zero, of either sign."""
    integers = INTEGERS[dtype.itemsize]
    last = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(integers))
    few = torch.cat([torch.arange(9), torch.linspace(9, last - 1, 51, dtype=torch.float64).long()])
    low, high = (bits.to(integers).view(dtype).double() for bits in (few, few + 1))
    middle = (low + high) / 2
    numbers = torch.stack([middle, middle * (1 + 2.0**-40), -middle * (1 - 2.0**-40), low * 0])
    delta = LowRank(Layout("oi", tuple(numbers.shape)), numbers, torch.eye(4, dtype=torch.float64), 1.0, 4)
    for zero in (0.0, -0.0):
        weight = torch.full(numbers.shape, zero, dtype=dtype)
        fold_alone(weight, delta)
        even = torch.where(few % 2 == 0, low, high)
        assert torch.equal(weight.double(), torch.stack([even, high, -low, low * 0]))
        assert bool(weight[2].signbit().all()) and not bool(weight[3].signbit().any())


def fold_alone(weight: torch.Tensor, *deltas) -> None:
    (one,) = [FusedSum.of(weight, deltas, False, "w", ["a"])]
    ahead = folding.foresee([one], [False])
    assert isinstance(ahead.sums[0], FusedSum)
    ahead.sums[0].fold_for_good(ahead.scratch(0), ahead.founds[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.02, 1.0, 1e4], ids=["places", "steps", "numbers"])
def test_the_way_back_is_kept_in_each_of_its_forms(monkeypatch, dtype, size):
    monkeypatch.setattr(fold_kernels, "ROWS", 16)
    model = layer(dtype, 50, 150)
    with torch.no_grad():
        model.weight_lora_default.B.mul_(size)
        model.weight[0] = 0.0
        model.weight[1] = -0.0
        model.weight[2, ::2] = float(torch.finfo(dtype).smallest_normal) / 4
    state, plain = reference.bits(model), without_kernels(copy.deepcopy(model), lora_fx.fold)
    lora_fx.fold(model)
    assert reference.same_bits(reference.bits(model), reference.bits(plain))
    assert kept_bytes(model) <= kept_bytes(plain)
    forms_ = [(r.places is None, r.nibbles is None) for r in (way_of(model).remainders[0], way_of(plain).remainders[0])]
    assert forms_[0] == forms_[1]
    moved = copy.deepcopy(model)
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_sum, "_BLOCK", 7 * 150)  # an even number of rows each, and some at the end
        assert reference.same_bits(reference.bits(without_kernels(moved, lora_fx.unfold)), state)


def test_components_that_one_product_of_matrices_does_not_take_are_summed_by_several():
    model = layer(torch.float32, 40, 50, rank=2 * fold_kernels.RANKS + 3)
    plain = without_kernels(copy.deepcopy(model), lora_fx.fold)
    lora_fx.fold(model)
    assert isinstance(way_of(model), FusedWay) and torch.equal(model.weight, plain.weight)


def test_two_steps_of_odd_rows_would_share_a_byte_so_torch_folds_them_unless_nothing_is_kept(monkeypatch):
    model = layer(torch.bfloat16, 6, 33)
    plain = without_kernels(copy.deepcopy(model), lora_fx.fold)
    assert type(way_of(lora_fx.fold(copy.deepcopy(model)))) is Way
    seen = count_launches(monkeypatch)
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    lora_fx.fold(model, final=True)
    assert torch.equal(model.weight, plain.weight) and seen == [0, 1]


def count_launches(monkeypatch) -> list[int]:
    """What comes gets what the kernels are asked to do."""
    real, seen = FusedSum.launch, []
    monkeypatch.setattr(FusedSum, "launch", lambda one, mode, *rest: seen.append(mode) or real(one, mode, *rest))
    return seen


def of_many(dtype: torch.dtype, hard: int) -> nn.Module:
    """As many sums as there are layers times `hard` lie where float64 cannot decide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48, bias=False), nn.Linear(48, 24, bias=False), nn.Linear(24, 40)).to(dtype)
    lora_fx.apply(model, Rule(where="*", rank=3, alpha=2), torch.randn(2, 40).to(dtype), check=False)
    reference.fill(model)
    with torch.no_grad():
        for one in model if hard else ():
            adapter = one.weight_lora_default
            adapter.A[0] = 0.0
            adapter.A[:, :hard] = torch.tensor([[torch.finfo(dtype).eps / 2], [2.0**-60], [0.0]])
            adapter.B[0] = torch.tensor([1.5, 1.0, 0.7])  # the scale is 2/3
            one.weight[0, :hard] = 1.0
    return model


@pytest.mark.parametrize("hard", [0, 3], ids=["plain", "hard"])
@pytest.mark.parametrize("final", [False, True], ids=["undoable", "final"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fold_waits_twice_at_most_and_launches_twice_a_weight(monkeypatch, dtype, final, hard):
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    model = of_many(dtype, hard)
    state, plain = reference.bits(model), without_kernels(copy.deepcopy(model), lora_fx.fold)
    seen = count_launches(monkeypatch)
    with Waits() as waits:
        lora_fx.fold(model, final=final)
    assert waits.seen == ["tolist"] * (2 if hard else 1) and seen == [0] * 3 + [1] * 3
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model, plain, strict=True))
    if hard:
        assert bool((model[0].weight[0, :hard] == 1 + torch.finfo(dtype).eps).all()), "a hair above the middle"
    if not final:
        seen.clear()
        with Waits() as waits:
            lora_fx.unfold(model)
        assert waits.seen == ["tolist"] * 2 and seen == [2] * 3
        assert reference.same_bits(reference.bits(model), state)


def test_a_weight_with_much_in_doubt_takes_torchs_route():
    model = layer(torch.float32, 40, 60, rank=2)
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight_lora_default.A.fill_(2.0**-25)  # 1 + 2⁻²⁴ and a hair
        model.weight_lora_default.B[:] = torch.tensor([2.0, 2.0**-40]) / model.weight_lora_default.scale
    state = reference.bits(model)
    folded = lora_fx.fold(model, copy=True)
    assert type(way_of(folded)) is Way and bool((folded.weight == 1 + 2.0**-23).all())
    assert reference.same_bits(reference.bits(lora_fx.unfold(folded)), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["NaN in W", "Inf in B", "NaN in A", "too large", "too large where float64 doubts"])
def test_what_is_not_finite_is_refused_before_anything_is_written_in_the_words_of_torchs_route(dtype, what):
    model, largest = of_many(dtype, 0), torch.finfo(dtype).max
    adapter = model[2].weight_lora_default
    with torch.no_grad():
        if what == "NaN in W":
            model[2].weight[3, 5] = math.nan
        elif what == "Inf in B":
            adapter.B[3, 1] = math.inf
        elif what == "NaN in A":
            adapter.A[1, 2] = math.nan
        else:
            model[2].weight[3, 5] = largest
            adapter.B[3], adapter.A[:, 5] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.5, 0.0, 0.0])
            half = largest * torch.finfo(dtype).eps / (4 - 2 * torch.finfo(dtype).eps)  # halfway to what would be next
            adapter.B[3] *= half if "doubts" in what else largest / 2
            adapter.A[1, 5], adapter.B[3, 1] = 2.0**-50, half  # the scale is not quite 2/3
    state = reference.bits(model)
    with pytest.raises(FoldError) as mine:
        lora_fx.fold(model)
    assert reference.same_bits(reference.bits(model), state)
    assert mine.value.place == "2.weight"
    if "doubts" not in what:
        with pytest.raises(FoldError) as theirs:
            without_kernels(model, lora_fx.fold)
        assert str(mine.value) == str(theirs.value)
    else:
        assert "does not fit into" in str(mine.value)


@pytest.mark.parametrize("strength", [-1.7e-60, 1e60, 0.0, 1 + 2.0**-40])
def test_a_strength_acts_in_all_its_bits(strength):
    torch.manual_seed(0)
    A, B = torch.randn(2, 10), torch.randn(8, 2, dtype=torch.float64) / (strength or 1.0)
    weight = torch.randn(8, 10)
    plain = exact_sum.folded_weight(weight, [LowRank(Layout("oi", (8, 10)), A, B, strength, 2)], weight.dtype, "w")
    fold_alone(weight, LowRank(Layout("oi", (8, 10)), A.double(), B, strength, 2))
    assert torch.equal(weight, plain)


@pytest.mark.parametrize(("size", "verb"), [(0.02, "fold"), (1e4, "fold"), (0.02, "unfold"), (1.0, "unfold")])
def test_what_is_cut_short_at_any_line_is_what_it_was(size, verb):
    model = of_many(torch.bfloat16, 3)[:1]
    with torch.no_grad():
        model[0].weight_lora_default.B[1:] *= size
    weight, deltas = model[0]._parameters["weight"].detach(), [model[0].weight_lora_default.exact()]
    ahead, before = folding.foresee([FusedSum.of(weight, deltas, True)], [True]), weight.clone()
    fused, way = ahead.sums[0], None

    def fold(undo):
        fused.answers[0, fold_kernels.FILLED :] = 0
        return fused.fold(ahead.scratch(0), undo, ahead.founds[0])

    if verb == "unfold":
        way, before = fold([]), weight.clone()
    call = fold if way is None else partial(way.take_back, weight)
    with Stop(-1) as lines:
        call([])
    weight.copy_(before)
    for at in sorted({line: n for n, line in enumerate(lines.seen)}.values())[::2]:
        undo = []
        with pytest.raises(KeyboardInterrupt), Stop(at):
            call(undo)
        for step in reversed(undo):
            step()
        assert torch.equal(weight, before), lines.seen[at]


class Stop:
    """Ctrl-C at the nth line of `fused_sum` that runs."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, []

    def __enter__(self) -> Stop:
        self.before = sys.gettrace()
        sys.settrace(lambda frame, *_: self.line if frame.f_code.co_filename == fused_sum.__file__ else None)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(self.before)

    def line(self, frame, event, arg):
        if event == "line":
            self.seen.append(frame.f_lineno)
            if len(self.seen) - 1 == self.at:
                raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize("verb", ["fold", "unfold"])
def test_without_memory_at_any_operation_the_model_is_what_it_was(verb):
    from tests.test_faults import ShortOfMemory

    model = of_many(torch.bfloat16, 1)[:2]
    if verb == "unfold":
        lora_fx.fold(model)
    call, state = getattr(lora_fx, verb), reference.bits(model)
    with ShortOfMemory() as mode:
        call(copy.deepcopy(model))
    refused = 0
    for at in range(0, mode.seen, mode.seen // 10):
        try:
            with ShortOfMemory(at):
                call(model)
        except (torch.OutOfMemoryError, lora_fx.LoraFxError) as error:
            assert "no memory" in str(error)
            refused += 1
        else:
            (lora_fx.unfold if verb == "fold" else lora_fx.fold)(model)
        assert reference.same_bits(reference.bits(model), state), at
    assert refused > 2


def test_a_large_final_fold_asks_for_no_memory_once_it_writes(monkeypatch):
    from tests.test_faults import ShortOfMemory

    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    model, writes = of_many(torch.bfloat16, 3), []
    real = FusedSum.fold_for_good

    def watched(one, *rest):
        with ShortOfMemory() as mode:
            real(one, *rest)
        writes.append(mode.seen)

    monkeypatch.setattr(FusedSum, "fold_for_good", watched)
    lora_fx.fold(model, final=True)
    assert writes == [0, 0, 0]


def test_a_card_for_which_there_is_no_kernel_takes_torchs_route_and_that_is_said_once(monkeypatch):
    model = of_many(torch.bfloat16, 0)
    plain = without_kernels(copy.deepcopy(model), lora_fx.fold)

    def fail(*_, **__):
        raise RuntimeError("no such card")

    monkeypatch.setattr(fold_kernels, "fold", {(n,): fail for n in range(99)})
    with pytest.warns(UserWarning, match="folds on cpu .* not Triton's: NoKernel: no such card") as said:
        folded = lora_fx.fold(model, copy=True)
        lora_fx.fold(model, copy=True)
    assert len(said) == 1 and reference.same_bits(reference.bits(folded), reference.bits(plain))


def test_a_kernel_that_rounds_otherwise_is_seen(monkeypatch):
    fused_sum.prove(CPU)
    monkeypatch.setattr(fused_sum, "folded_weight", lambda weight, *args: weight * 1.0078125)
    with pytest.raises(ArithmeticError, match=r"other bits in .*bfloat16"):
        fused_sum.prove(CPU)


def test_a_kernel_that_does_not_give_the_weight_back_is_seen(monkeypatch):
    monkeypatch.setattr(FusedSum, "take_back", lambda *args: None)
    with pytest.raises(ArithmeticError, match=r"other bits in .*bfloat16"):
        fused_sum.prove(CPU)
