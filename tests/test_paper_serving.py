"""The paper's table 1 and its task switching: what is compared, how it is timed, and verdicts that can be no."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from click.testing import CliRunner

import lora_fx
from lora_fx.cli.paper import paper
from lora_fx.errors import FileError, LoraFxError
from lora_fx.export import Session
from lora_fx.paper import latency, switching
from lora_fx.paper.counts import agreement
from lora_fx.paper.latency import (
    ADAPTER_H,
    ADAPTER_L,
    ADAPTERS,
    AGAIN,
    BASE,
    CUDA,
    FOLDED,
    OPENINGS,
    SIZES,
    SYSTEMS,
    UNFOLDED,
    Opening,
    Plan,
    Shape,
    Size,
    adapter_parameters,
    measure,
    rank_of,
    rows,
    rule_of,
    shown,
    to_json,
    verdicts,
)
from lora_fx.paper.timing import Interval, interleaved, ratios

TINY = Shape(1, 64)
SMALL = Size(1, 8), Size(3, 5)
PNG = b"\x89PNG"


# ── intervals and rounds ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 11])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_an_interval_has_the_confidence_that_it_says(n, confidence):
    """Over all ways in which n values can lie on one side or the other of the true median, each as likely."""
    found = Interval.of(list(range(n)), confidence)
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]  # k of them are above
    low, high = round(found.low), round(found.high)
    inside = sum(chance for k, chance in enumerate(chances) if n - k > low and n - k <= high)
    assert inside == found.confidence
    narrower = sum(chance for k, chance in enumerate(chances) if n - k > low + 1 and n - k <= high - 1)
    assert narrower < confidence and (inside >= confidence or low == 0)
    assert found.median == (n - 1) / 2


def test_rounds_call_everything_once_and_count_all_but_the_first():
    now, made = [0.0], []

    def call(name, seconds):
        made.append(name)
        now[0] += seconds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 2.5)}
    steps: list[int] = []
    times = interleaved(
        calls, 0, 6, before={"b": lambda: call("before b", 7.0)}, step=steps.append, clock=lambda: now[0]
    )
    assert times == {"a": [1.0] * 6, "b": [2.5] * 6} and steps == [1, 2, 3, 4, 5, 6]
    alone = [name for name in made if name != "before b"]
    assert {tuple(alone[k : k + 2]) for k in range(0, 14, 2)} == {("a", "b"), ("b", "a")}  # in either order
    assert [made[k - 1] for k, name in enumerate(made) if name == "b"] == ["before b"] * 7
    assert ratios(times, "b", "a") == [2.5] * 6


# ── what is compared ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_adapters_have_the_papers_parameters():
    """11M at 1×128 and 16×256, and 0.5M at 32×512."""
    for size, printed in zip(SIZES, ("11", "11", "0.5"), strict=True):
        for system in ADAPTERS:
            rank = rank_of(system, size.budget, Shape())
            assert agreement(printed, adapter_parameters(system, rank, Shape())) != "no"
    assert [size.theirs.slower[ADAPTER_H] for size in SIZES] == [30.3, 8.4, 3.0]
    assert [size.theirs.slower[ADAPTER_L] for size in SIZES] == [20.7, 5.0, 2.2]


@pytest.mark.parametrize("shape", [Shape(2), Shape(24, 128), Shape(2, 128)])
def test_a_smaller_shape_keeps_the_share_of_the_vocabulary(shape):
    """To the rounding to a whole word; at first narrow layers had all words, which were most of a call of one token."""
    share, whole = (s.vocabulary / (12 * s.layers * s.width) for s in (shape, Shape()))
    assert abs(share - whole) <= 0.5 / (12 * shape.layers * shape.width)


@pytest.mark.parametrize("system", [FOLDED, ADAPTER_H, ADAPTER_L])
def test_parameters_are_those_of_a_plan(system):
    plan = lora_fx.plan(TINY.build(), rule_of(system, 3), torch.arange(8)[None])
    assert plan.parameters == adapter_parameters(system, 3, TINY)
    assert len(plan.rows) == (1 if system == ADAPTER_L else 2)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def openings(turned: int = 0, **ratio: float | list[float]) -> list[Opening]:
    """Nine, which scatter by half a percent around these ratios; all others are 1.

    Args:
        turned: by how many openings another size's scatter is behind.
    """
    named = {"again": AGAIN, "folded": FOLDED, "H": ADAPTER_H, "L": ADAPTER_L}
    scatter = [0.995, 0.997, 0.998, 0.999, 1.0, 1.001, 1.002, 1.003, 1.005]
    made = []
    for n in range(9):
        own = {s: scatter[(n + 2 * k + turned) % 9] for k, s in enumerate(SYSTEMS)} | {BASE: 1.0}
        for name, value in ratio.items():
            own[named[name]] *= value
        made.append(Opening(f"{n}", {s: 10 * own[s] for s in SYSTEMS}, own, 7, 0.1))
    return made


FIRST, LAST = SIZES[0], SIZES[2]


def judged(first: list[Opening], last: list[Opening]) -> dict[str, bool]:
    plan = Plan(Shape(), (FIRST, LAST))
    return {v.says: v.holds for v in verdicts(rows(plan, {FIRST: first, LAST: last}))}


def test_all_of_it_holds_where_timings_are_the_papers():
    found = judged(openings(H=1.303, L=1.207), openings(4, H=1.03, L=1.022))
    assert len(found) == 8 and all(found.values())


@pytest.mark.parametrize(
    ("first", "wrong"),
    [
        (openings(H=1.303, L=1.207, folded=1.02), "1×128: folded is within what the base has against itself"),
        (openings(H=1.303, L=1.207, folded=0.98), "1×128: folded is within what the base has against itself"),
        (openings(H=1.303, L=1.207, again=1.02), "1×128: folded is within what the base has against itself"),
        (openings(H=1.303, L=1.04), None),
        (openings(H=1.303, L=1.024), "Adapter L is slowed most at 1×128"),
        (openings(H=1.02, L=1.207), "Adapter H is slowed most at 1×128"),
    ],
)
def test_what_does_not_hold_is_said(first, wrong):
    found = judged(first, openings(4, H=1.03, L=1.022))
    assert [says for says, holds in found.items() if not holds] == ([wrong] if wrong else [])


def test_openings_that_scatter_are_paired_with_both_sessions_of_the_base():
    base = [0.97, 0.98, 0.985, 0.99, 1.0, 1.01, 1.015, 1.02, 1.03]  # of its first session, in each opening
    made = []
    for n, own in enumerate(base):
        ratio = {s: (1.026 if s in (ADAPTER_H, ADAPTER_L) else 1.0) / (1.0 if s == BASE else own) for s in SYSTEMS}
        made.append(Opening(f"{n}", {s: 10 * ratio[s] for s in SYSTEMS}, ratio, 7, 0.1))
    found = judged(made, made)
    assert found["1×128: Adapter H is slower than the base"] and found["32×512: Adapter L is slower than the base"]


def test_sizes_are_compared_opening_by_opening():
    """By 0.4 %, which is less than openings scatter by, where they scatter alike; and not where they do not."""
    first = openings(H=1.026, L=1.026)
    for turned, most in ((0, True), (4, None)):
        found = judged(first, openings(turned, H=1.022, L=1.022))
        assert [found[f"{system} is slowed most at 1×128"] for system in ADAPTERS] == [most] * 2


@pytest.mark.parametrize(("ratio", "slower"), [(0.9, False), (1.0, None), (1.002, None), (1.02, True)])
def test_an_adapter_that_is_not_told_apart_is_not_slower(ratio, slower):
    found = judged(openings(H=ratio, L=1.2), openings(H=0.8, L=1.2))
    assert (
        found["1×128: Adapter H is slower than the base"] is slower
        and found["1×128: Adapter L is slower than the base"]
    )
    assert found["Adapter L is slowed most at 1×128"] is None and found["Adapter H is slowed most at 1×128"]
    assert not judged(openings(H=ratio), openings(H=1.2))["Adapter H is slowed most at 1×128"]
    plan = Plan(Shape(), (FIRST,))
    text = shown(plan, rows(plan, {FIRST: openings(H=ratio, L=1.2)}))
    last = {
        False: "2 of 3 hold here.",
        None: "2 of 3 hold here, 1 are not told apart (?).",
        True: "All of it holds here.",
    }
    assert text.splitlines()[-1] == last[slower]
    assert to_json(plan, rows(plan, {FIRST: openings(H=ratio, L=1.2)}))["holds"] is slower


def test_the_table_has_the_papers_numbers_beside_its_own():
    plan = Plan(Shape(2), (Size(1, 32, "1×128"), Size(16, 256), Size(7, 9)))
    found = rows(plan, {size: openings(H=1.25, L=1.5) for size in plan.sizes})
    lines = shown(plan, found).splitlines()
    assert (
        "2 of 24 layers" in lines[0]
        and "4,188 of 50,257 words" in lines[0]
        and "1×32 in the place of 1×128" in lines[3]
    )
    own = [line.split() for line in lines if "Adapter H" in line and "slower" not in line and "slowed" not in line]
    assert [line[-2:] for line in own] == [["+30.3", "%"], ["+8.4", "%"], ["+25.0", "%"]]
    assert all("1.250" in line and "+25.0" in line for line in own)
    said = json.loads(json.dumps(to_json(plan, found)))
    assert said["shape"]["scaled"] and not said["holds"] and len(said["rows"]) == 18
    assert said["rows"][4]["slower_percent"] == 25.0 and said["rows"][4]["theirs_percent"] == 30.3


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def instant(monkeypatch):
    """No model and no runtime: what is exported and run is noted."""
    done: list[str] = []

    def export(shape, system, rank, path, opset, check=False):
        done.append(f"export {path.stem}")
        path.touch()

    class Fake:
        def __init__(self, plan, path, size):
            self.name, self.shape = path.stem, (size.batch, size.length)

        def run(self, outputs, feeds):
            assert feeds["input_ids"].shape == self.shape
            done.append(f"{self.name} {feeds['input_ids'].shape}")

    monkeypatch.setattr(latency, "TURN", 0)
    monkeypatch.setattr(latency, "export", export)
    monkeypatch.setattr(latency, "_session", Fake)
    return done


def test_an_interrupted_measurement_goes_on_where_it_was(instant, tmp_path):
    plan = Plan(TINY, SMALL, openings=2, seconds=0)
    files = len(plan.files)
    steps: list[str] = []

    def interrupt(name):
        steps.append(name)
        if len(steps) == files + 3:  # two sizes in the first opening, one in the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(plan, tmp_path, interrupt)
    with (tmp_path / OPENINGS).open("a", encoding="utf-8") as file:
        file.write('{"key": "ab')  # as a machine that loses its power leaves it
    first = list(instant)
    assert len([line for line in first if line.startswith("export")]) == files
    instant.clear()
    steps.clear()
    found = measure(plan, tmp_path, steps.append)
    assert set(instant) == {line for line in first if line.endswith("(3, 5)")}  # once more, and no export
    assert len(steps) == plan.steps and len(found) == 2 * len(SYSTEMS)
    assert [path.name for path in tmp_path.iterdir()] == [OPENINGS]  # the models are gone
    instant.clear()
    assert measure(plan, tmp_path) == found and not instant
    measure(dataclasses.replace(plan, threads=1), tmp_path)  # another measurement
    assert instant


def test_a_size_has_the_files_of_its_own_ranks(instant, tmp_path):
    plan = Plan(Shape(), SIZES, openings=1, seconds=0)
    assert len(plan.files) == 7  # the adapters with two ranks each
    measure(plan, tmp_path)
    ran = {tuple(line.split(" ", 1)) for line in instant if not line.startswith("export")}
    by_size = {size: {name for name, ids in ran if ids == f"({size.batch}, {size.length})"} for size in SIZES}
    assert by_size[SIZES[0]] == by_size[SIZES[1]] and len(by_size[SIZES[0]]) == 5
    assert by_size[SIZES[2]] - by_size[SIZES[0]] == {"Adapter-H-r5", "Adapter-L-r9"}


def test_a_turn_is_as_many_calls_as_take_its_time():
    clock = iter([0, 0.004, 0, 0.001, 0, 0.002])
    assert latency._calls_of_a_turn(lambda: None, lambda: next(clock)) == 1000 * latency.TURN == 5
    clock = iter([0, 0.0] * 3)  # a clock that is too coarse
    assert latency._calls_of_a_turn(lambda: None, lambda: next(clock)) == 1e6 * latency.TURN
    clock = iter([0, 3.0] * 3)
    assert latency._calls_of_a_turn(lambda: None, lambda: next(clock)) == 1
    done: list[int] = []
    latency._repeat(lambda: done.append(1), 5)
    assert len(done) == 5


def test_a_time_is_one_of_a_call(instant, tmp_path, monkeypatch):
    """Of a turn of ten calls a tenth."""
    now = iter(range(10**6))
    monkeypatch.setattr(latency, "_calls_of_a_turn", lambda call, clock: 10)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(now)))
    found = measure(Plan(TINY, SMALL[:1], openings=1, seconds=0), tmp_path)
    assert [row.ms for row in found] == [100.0] * len(SYSTEMS)


def test_batches_and_lengths_are_divided_and_it_is_said(instant, tmp_path):
    options = ["--width", "64", "--scale", "4", "--shorter", "100", "--openings", "1", "--seconds", "0"]
    result = CliRunner().invoke(paper, ["latency", "-o", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "latency.json").read_text("utf-8"))
    sizes = dict.fromkeys((row["size"], row["stands_for"]) for row in said["rows"])
    assert list(sizes) == [("1×1", "1×128"), ("4×2", "16×256"), ("8×5", "32×512")]
    assert "Sizes: 1×1 in the place of 1×128, 4×2 in the place of 16×256, 8×5 in the place of 32×512." in result.output
    assert {line.split()[-1] for line in instant if not line.startswith("export")} == {"1)", "2)", "5)"}


@pytest.mark.parametrize("line", ["{}", "3", '{"key": "a", "ms": {}, "ratio": {}, "rounds": 1, "load": 0}'])
def test_a_note_that_is_none_is_refused_by_its_place(instant, tmp_path, line):
    (tmp_path / OPENINGS).write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(FileError, match=r"openings.jsonl, line 1: it is no note"):
        measure(Plan(TINY, SMALL), tmp_path)
    assert not instant


@pytest.mark.onnx
def test_the_command_measures_files_that_are_what_torch_computes(tmp_path, monkeypatch):
    """A file of each kind is held against torch as it is exported; all but the base's give something else than it."""
    own, given, ids = latency.export, {}, torch.arange(8).reshape(2, 4)

    def checked(shape, system, rank, path, opset):
        own(shape, system, rank, path, opset, check=system in (UNFOLDED, ADAPTER_L))
        given[system] = torch.from_numpy(Session(path).session.run(None, {"input_ids": ids.numpy()})[0])

    session, seen = latency._session, []

    def opened(plan, path, size):
        made = session(plan, path, size)
        seen.append(made.get_inputs()[0].shape)
        return made

    monkeypatch.setattr(latency, "export", checked)
    monkeypatch.setattr(latency, "_session", opened)
    monkeypatch.setattr(latency, "QUICK_SHAPE", TINY)
    monkeypatch.setattr(latency, "QUICK", SMALL)
    out = tmp_path / "new" / "out"
    result = CliRunner().invoke(paper, ["latency", "-o", str(out), "--quick", "--openings", "2"])
    assert result.exit_code == 0, result.output
    assert set(given) == set(SYSTEMS) - {AGAIN} and given[BASE].shape == (2, 1, TINY.vocabulary)

    assert {tuple(shape) for shape in seen} == {(size.batch, size.length) for size in SMALL}  # each for its own calls

    def difference(one: str, other: str) -> float:
        return float((given[one] - given[other]).abs().max())

    rounding = difference(UNFOLDED, FOLDED)  # the same adapter
    assert all(difference(system, BASE) > 100 * rounding for system in (FOLDED, *ADAPTERS))
    assert sorted(path.name for path in out.iterdir()) == ["latency.json", "latency.png", "latency.txt", OPENINGS]
    text = (out / "latency.txt").read_text("utf-8")
    assert text in result.output and "Adapter L" in text and "hold" in text
    said = json.loads((out / "latency.json").read_text("utf-8"))
    assert [row["system"] for row in said["rows"]] == [*SYSTEMS, *SYSTEMS]
    assert all(row["ms"] > 0 and row["ratio"]["confidence"] == 0.5 for row in said["rows"])
    assert (out / "latency.png").read_bytes().startswith(PNG)


def test_what_cannot_be_measured_is_refused_before_anything_is_done(tmp_path):
    def refused(*options: str) -> str:
        result = CliRunner().invoke(paper, ["latency", "-o", str(tmp_path / "out"), *options])
        assert result.exit_code == 2 and not (tmp_path / "out").exists(), result.output
        return result.output

    assert "BATCHxLENGTH" in refused("--size", "1×128") and "BATCHxLENGTH" in refused("--size", "0x3")
    assert "at most 1024" in refused("--size", "1x1025")
    assert "width=100 is no number of whole heads" in refused("--width", "100")
    assert "a size is given twice" in refused("--size", "1x8", "--size", "1x8")
    assert "of a GPU is not that of a call" in refused("--cuda", "--processor-time")
    assert "of 2 threads is not that of a call" in refused("--threads", "2", "--processor-time")
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        text = refused("--cuda")
        assert CUDA in text and "is not in this build of ONNX Runtime" in text and "lora-fx[onnx-gpu]" in text


@pytest.mark.gpu
def test_on_cuda(tmp_path):
    import onnxruntime

    if not torch.cuda.is_available() or CUDA not in onnxruntime.get_available_providers():
        pytest.skip("no CUDA in this build of ONNX Runtime")
    found = measure(Plan(TINY, SMALL, openings=1, seconds=0, cuda=True), tmp_path)
    assert all(row.ms > 0 for row in found)


# ── task switching ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_weights_after_a_switch_are_the_tasks_own(tmp_path):
    found = switching.measure(TINY, 3, tmp_path)
    assert not list(tmp_path.iterdir())  # the checkpoints are gone
    assert found.way("switch").bytes == 4 * adapter_parameters(FOLDED, 4, TINY)
    weights = sum(p.numel() for p in TINY.build().parameters())
    assert 4 * weights < found.way("reload").bytes < 4 * weights + 4096  # and the table of a file
    assert all(way.seconds > 0 for way in found.ways) and found.way("reload").reload.span == "1.000–1.000"


def test_a_switch_that_leaves_the_weights_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_fx, "switch", lambda model, *names: model)
    with pytest.raises(LoraFxError, match="is not the weight of 'second'"):
        switching.measure(TINY, 1, tmp_path)


def outcome(reload: list[float], disk: list[float]) -> switching.Outcome:
    """Of a switch that these are a multiple of."""
    intervals = Interval.of(reload), Interval.of(disk)
    ways = [switching.Way(name, 100, 0.1, *intervals) for name in ("switch", "activate")]
    ways += [switching.Way(name, 90_000, 0.1, *intervals) for name in ("reload", "reload, from disk")]
    return switching.Outcome(Shape(), 2, len(reload), 0.0, tuple(ways))


def test_a_switch_is_faster_only_where_all_of_its_interval_is():
    fast, slow, mixed = [1.5 + 0.01 * n for n in range(15)], [0.5] * 15, [0.9 + 0.02 * n for n in range(15)]
    found = switching.verdicts(outcome(fast, mixed))
    assert [v.holds for v in found] == [True, True, None, True, None] and "900 times fewer" in found[0].seen
    found = switching.verdicts(outcome(slow, fast))
    assert [v.holds for v in found] == [True, False, True, False, True]
    assert "3 of 5 hold here." in switching.shown(outcome(slow, fast))


def test_the_command_writes_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "QUICK_SHAPE", TINY)
    result = CliRunner().invoke(paper, ["switching", "-o", str(tmp_path), "--quick", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["switching.json", "switching.txt"]
    said = json.loads((tmp_path / "switching.json").read_text("utf-8"))
    assert [way["name"] for way in said["ways"]] == list(switching.WAYS) and said["rounds"] == 2
    assert (tmp_path / "switching.txt").read_text("utf-8") in result.output


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for run in (
        lambda: measure(Plan(TINY, SMALL), tmp_path / "file"),
        lambda: switching.measure(TINY, 1, tmp_path / "file"),
    ):
        with pytest.raises(FileError, match="the folder cannot be written"):
            run()
    assert (tmp_path / "file").read_text("utf-8") == "mine"
