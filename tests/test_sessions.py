"""One switchable graph: the base or any adapter in each call, in every kind of run; and folded weights for a graph."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare
from lora_fx.errors import AdapterError, ExportError
from lora_fx.export import Session, onnx_digest, save_onnx_adapter, save_onnx_weights
from lora_fx.export.onnx import loading, runtimes
from tests import reference

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

X = torch.linspace(-1, 1, 2 * 3 * 7).reshape(2, 3, 7)
IDS = torch.tensor([[1, 4, 2], [0, 3, 5]])
RULES = {
    "one": Rule(where="embed | qkv", rank=3),
    "two": Rule(where="conv | head", rank=2, alpha=5),
    "three": Rule(where="head", rank=5, scaling="rslora"),
}


class Net(nn.Module):
    """An embedding, a convolution, a fused weight and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(8, 12), nn.Conv1d(3, 12, 3, padding=1)
        self.qkv, self.head = nn.Linear(12, 18), nn.Linear(6, 300, bias=False)

    def forward(self, ids, x):
        h = self.embed(ids) + self.conv(x).mean(-1, keepdim=True).mT
        q, k, v = self.qkv(h).chunk(3, -1)
        return {"logits": self.head((q @ k.mT).softmax(-1) @ v)}


INPUTS = {"ids": IDS, "x": X}
AXES = {"ids": {0: "batch"}, "x": {0: "batch"}}


def build() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for name, rule in RULES.items():
        lora_fx.apply(model, rule, INPUTS, name=name)
    reference.fill(model)
    return model


class Place:
    def __init__(self, folder: Path) -> None:
        self.model, self.folder = build(), folder
        self.before = reference.bits(self.model), reference.classes(self.model)
        self.report = lora_fx.export_onnx(
            self.model, INPUTS, folder / "m.onnx", dynamic_shapes=AXES, adapters="switchable"
        )
        self.files = {name: save_onnx_adapter(self.model, folder / f"{name}.onnx_adapter", name=name) for name in RULES}

    def session(self, *names: str) -> Session:
        return Session(self.report.path, adapters={name: self.files[name] for name in names or RULES})

    def torch(self, *names: str) -> torch.Tensor:
        lora_fx.activate(self.model, *names)
        with torch.no_grad():
            return self.model(**INPUTS)["logits"]

    def close(self, got, *names: str) -> bool:
        """By the bound that the export measured for this adapter; a sum of two by the larger one's."""
        wanted = self.torch(*names)
        own = [c.reports[0] for c in self.report.comparisons if c.adapter in (names or ("no adapter",))]
        error = (torch.as_tensor(got) - wanted).norm() / wanted.norm()
        return bool(error <= max(report.bound for report in own))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("switchable"))


def feeds() -> dict[str, numpy.ndarray]:
    return {name: tensor.numpy() for name, tensor in INPUTS.items()}


# ── every kind of run ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_export_compares_every_adapter_and_leaves_the_model_alone(place):
    comparisons = place.report.comparisons
    assert {c.adapter for c in comparisons} == {"no adapter", *RULES} and len(comparisons) == 12
    assert [i.name for i in place.report.inputs] == ["ids", "x"] and place.report.form == "switchable"
    lora_fx.activate(place.model, *RULES)
    assert reference.same_bits(place.before[0], reference.bits(place.model))
    assert place.before[1] == reference.classes(place.model)


@pytest.mark.parametrize("names", [(), ("one",), ("two",), ("three",), ("one", "three"), ("one", "two")], ids=str)
def test_each_adapter_is_torchs_in_plain_bound_and_asynchronous_runs(place, names):
    session = place.session()
    binding = session.session.io_binding()
    for name, array in feeds().items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    for _ in range(2):  # after another one, too
        session.bind_adapter(binding, "two")
        session.session.run_with_iobinding(binding)
        session.bind_adapter(binding, names)
        session.session.run_with_iobinding(binding)
        tensors = session.run(INPUTS, names)["logits"]
        assert isinstance(tensors, torch.Tensor)
        for got in (
            session.run(feeds(), names)["logits"],
            session.run(tuple(feeds().values()), list(names))["logits"],
            tensors,
            session.run_async(feeds(), names).result()["logits"],
            binding.get_outputs()[0].numpy(),
        ):
            assert place.close(got, *names)
    others = [name for name in RULES if names != (name,)]
    assert not any(place.close(session.run(feeds(), name)["logits"], *names) for name in others)


def test_a_thousand_switches_leak_nothing(place):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    session, inputs = place.session(), feeds()
    names = [None, *RULES]
    first = {name: session.run(inputs, name)["logits"] for name in names}
    for n in range(1100):
        if n == 100:
            gc.collect()
            before = resident()
        name = names[n % 4]
        assert numpy.array_equal(session.run(inputs, name)["logits"], first[name])
        if n % 100 == 0:
            session.unload_adapter("three")
            session.load_adapter(place.files["three"])
    gc.collect()
    assert (resident() - before) * 4096 < 2**20  # a thousand copies of the smallest adapter would be 10 MiB


def test_an_adapter_lives_as_long_as_a_run_needs_it(place):
    session = place.session("two")
    for _ in range(5):
        future = session.run_async(feeds(), "two")
        session.unload_adapter("two")
        gc.collect()
        rubbish = [numpy.full(size, 9.0, numpy.float32) for size in (24, 600, 12, 42)]  # where the adapter was
        assert place.close(future.result()["logits"], "two") and session.adapters == {} and rubbish
        session.load_adapter(place.files["two"])
    assert not session._running


def test_a_run_of_some_outputs_and_what_the_session_says(place):
    session = place.session("one")
    assert session.inputs == ("ids", "x") and session.outputs == ("logits",)
    assert session.adapters == {"one": ("embed.weight", "qkv.weight")} and session.providers[-1] == runtimes.CPU
    assert session.run(feeds(), outputs=["logits"]).keys() == {"logits"}


def test_files_of_the_runtimes_own_adapters_work_in_the_runtime_too(place):
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(place.files["two"]))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    got = place.session("two").session.run(None, feeds(), options)[0]
    assert place.close(got, "two")


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(call, *parts: str) -> ExportError:
    with pytest.raises(ExportError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    return caught.value


def test_what_the_runtime_would_do_in_silence_is_refused(place):
    session = place.session()
    refused(lambda: session.run(feeds(), ("two", "three")), "both adapt head.weight", "run one of them")
    refused(lambda: session.run({**feeds(), "head.weight.lora_A": X}), "is a slot for an adapter", "load_adapter")
    refused(lambda: session.run(feeds(), "four"), "no adapter 'four'", "loaded: one, two, three")
    refused(lambda: session.unload_adapter("four"), "no adapter 'four'")
    refused(lambda: session.run({"ids": IDS.numpy()}), "x is missing", "takes ids, x")
    refused(lambda: session.run({**feeds(), "y": X}), "'y' is no input", "takes ids, x")
    refused(lambda: session.run((1, 2, 3)), "3 inputs", "takes ids, x")
    refused(
        lambda: session.run({"ids": IDS.int().numpy(), "x": X.numpy()}), "Unexpected input data type", "tensor(int64)"
    )
    refused(lambda: session.run({"ids": IDS, "x": X[:, :2]}), "Got: 2 Expected: 3", "ids: tensor(int64)")
    refused(lambda: session.run(feeds(), outputs=["loss"]), "'loss' is no output", "returns logits")


def test_what_is_no_name_and_no_array_is_refused(place):
    session = place.session()
    refused(lambda: session.run(feeds(), {"two": 0.5}), "gives strengths", "save_onnx_adapter")  # it ran at 1
    refused(lambda: session.run(feeds(), 3), "3 is no name")
    for wrong in (
        None,
        numpy.array([["a"]]),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, device="meta"),
    ):
        refused(lambda wrong=wrong: session.run({**feeds(), "x": wrong}), "the model takes")
    refused(lambda: Session(place.session().path, adapters=["two.onnx_adapter"]), "no mapping")
    refused(lambda: session.load_adapter(3), "3 is no path")
    refused(lambda: session.load_adapter(place.folder / "two.onnx_adapter", ""), "'' is no name")
    for copied in (pickle.dumps, copy.deepcopy):
        refused(lambda copied=copied: copied(session), "of one process")


def adapter_file(path: Path, factors: dict, version: int) -> Path:
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(version)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in factors.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))
    loading.seal(path)
    return path


def test_an_adapter_that_does_not_fit_is_refused(place, tmp_path):
    session = place.session("one")
    read = onnxruntime.AdapterFormat.read_adapter(str(place.files["three"]))
    version = read.get_model_version()
    a, b = (read.get_parameters()[f"head.weight.lora_{f}"].numpy().copy() for f in "AB")
    cases = {
        "is for base model": ({"head.weight.lora_A": a, "head.weight.lora_B": b}, version ^ 1),
        "no slot 'tail.weight.lora_": ({"tail.weight.lora_A": a, "tail.weight.lora_B": b}, version),
        "A and B of head.weight are of ranks [5]": ({"head.weight.lora_A": a}, version),
        "are of ranks [5, 3]": ({"head.weight.lora_A": a, "head.weight.lora_B": b[:, :3].copy()}, version),
        "the slot takes float32 [0, 6]": ({"head.weight.lora_A": a[:, :4].copy(), "head.weight.lora_B": b}, version),
        "float64 [5, 6]": ({"head.weight.lora_A": a.astype(numpy.float64), "head.weight.lora_B": b}, version),
        "holds NaN or Inf": ({"head.weight.lora_A": a * numpy.nan, "head.weight.lora_B": b}, version),
    }
    for n, (said, (factors, of)) in enumerate(cases.items()):
        path = adapter_file(tmp_path / f"{n}.onnx_adapter", factors, of)
        refused(lambda path=path: session.load_adapter(path), said, str(path))
    for damage in (b"", b"nonsense", place.files["three"].read_bytes()[:50]):
        (tmp_path / "damaged").write_bytes(damage)
        refused(lambda: session.load_adapter(tmp_path / "damaged"), "it has no digest", "save_onnx_adapter")
        if damage:
            loading.seal(tmp_path / "damaged")
            refused(lambda: session.load_adapter(tmp_path / "damaged"), "no adapter file", "save_onnx_adapter")
    assert session.adapters.keys() == {"one"}


def test_a_model_whose_base_changed_saves_no_adapter_for_the_graph(place, tmp_path):
    model = build()
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-6
    path = save_onnx_adapter(model, tmp_path / "one.onnx_adapter", name="one")
    refused(lambda: place.session("two").load_adapter(path), "is for base model", "base weights unchanged")


def test_saving_an_adapter_refuses(tmp_path):
    model = build()
    for known, it_has in ((model, "it has one, three, two"), (Net(), "it has no adapters")):
        with pytest.raises(AdapterError, match="there is no adapter named 'four'") as caught:
            save_onnx_adapter(known, tmp_path / "a", name="four")
        assert it_has in caught.value.remedy
    refused(lambda: save_onnx_adapter(model, tmp_path / "no" / "a", name="one"), "does not exist")
    folded = lora_fx.fold(build(), copy=True)
    refused(lambda: save_onnx_adapter(folded, tmp_path / "a", name="one"), "no adapter beside a weight", "unfold")
    with torch.no_grad():
        model.head.weight_lora_two.B[0, 0] = torch.inf
    refused(lambda: save_onnx_adapter(model, tmp_path / "a", name="two"), "NaN or Inf", "head.weight.lora_B")
    low = build().bfloat16()
    refused(lambda: save_onnx_adapter(low, tmp_path / "a", name="one"), "bfloat16", "cast this one back")
    assert not list(tmp_path.iterdir())


def test_the_name_before_the_path_still_works(place, tmp_path):
    with pytest.warns(DeprecationWarning, match="save_onnx_adapter\\(model, path, name=…\\)") as seen:
        made = save_onnx_adapter(place.model, "one", tmp_path / "old.onnx_adapter")
    assert seen[0].filename == __file__ and made == tmp_path / "old.onnx_adapter"
    with pytest.raises(TypeError):
        save_onnx_adapter(place.model, "one", tmp_path / "a", "two")  # two paths
    session = place.session()
    session.load_adapter(made, "old")
    one, old = (session.run(feeds(), name) for name in ("one", "old"))
    assert all(numpy.array_equal(one[name], old[name]) for name in one)


def test_a_file_without_slots_and_one_that_was_changed(place, tmp_path):
    plain = lora_fx.export_onnx(nn.Linear(5, 3), torch.zeros(2, 5), tmp_path / "p.onnx", check=False).path
    refused(lambda: Session(plain).load_adapter(place.files["one"]), "no slots for adapters", "switchable")
    file = onnx.load(place.report.path)
    for prop in file.metadata_props:
        if prop.key == "lora_fx.slots":
            said = json.loads(prop.value)
            said["inputs"]["head.weight.lora_A"]["shape"] = [0, 7]
            prop.value = json.dumps(said)
    onnx.save(file, tmp_path / "c.onnx")
    digest = onnx_digest(tmp_path / "c.onnx")
    refused(lambda: Session(tmp_path / "c.onnx"), "damaged, or were changed since", f"digest={digest!r}")
    of_another = "no input 'head.weight.lora_A' of float32 [0, 7]"
    refused(lambda: Session(tmp_path / "c.onnx", digest=digest), of_another, "another tool")
    refused(lambda: Session(tmp_path / "missing.onnx"), "cannot be read", "missing.onnx")


def test_tensors_through_kwargs_leave_no_place_for_slots(tmp_path):
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, **more):
            return self.linear(x + more["y"])

    inputs = {"x": torch.ones(2, 4), "y": torch.ones(2, 4)}
    model = lora_fx.apply(Loose().eval(), Rule(where="linear", rank=1), inputs)
    call = lambda: lora_fx.export_onnx(model, inputs, tmp_path / "m.onnx", adapters="switchable")  # noqa: E731
    refused(call, "takes tensors through **more", "forward names")


class _Mixed(nn.Module):
    """A linear, an equation, and convolutions, one of them transposed."""

    def __init__(self, spatial: int) -> None:
        super().__init__()
        conv, transposed = getattr(nn, f"Conv{spatial}d"), getattr(nn, f"ConvTranspose{spatial}d")
        self.linear, self.table = nn.Linear(5, 5), nn.Parameter(torch.randn(6, 5))
        self.conv, self.up = conv(4, 6, 2, groups=2, bias=False), transposed(6, 4, 2, groups=2, bias=False)

    def forward(self, x):
        beside = self.conv.weight.ndim - 3
        y = torch.einsum("bci,poi->bcpo", self.linear(x), self.table.view(2, 3, 5)).prod(2)
        return y, self.up(self.conv(x.reshape(2, 4, 5, *[1] * beside).expand(2, 4, 5, *[3] * beside)))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_an_empty_slot_has_the_least_rank_that_the_runtime_survives(tmp_path, spatial):
    """ONNX Runtime divides by the rank in a Conv and in an Einsum: with a rank of 0 that kills the process."""
    torch.manual_seed(0)
    model, x = _Mixed(spatial).eval(), torch.randn(2, 4, 5)
    lora_fx.apply(model, Rule(where="*", rank=2), x)
    reference.fill(model)
    made = lora_fx.export_onnx(model, x, tmp_path / "m.onnx", adapters="switchable")
    assert {comparison.adapter for comparison in made.comparisons} == {"no adapter", "default"}
    (said,) = [prop.value for prop in onnx.load(made.path).metadata_props if prop.key == "lora_fx.slots"]
    least = {entry["weight"]: entry["rank"] for entry in json.loads(said)["inputs"].values()}
    assert least == {"linear.weight": 0, "table": 1, "conv.weight": 1, "up.weight": 1}


# ── providers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_provider_that_is_not_there_is_an_error(place):
    path = place.report.path
    refused(lambda: Session(path, providers=["CUDAExecutionProvider"]), "not in this build", "onnx-gpu")
    refused(lambda: Session(path, providers=[("NoExecutionProvider", {})]), "no execution provider", runtimes.CPU)
    refused(lambda: Session(path, providers=[]), "there is none")
    assert Session(path, providers=[(runtimes.CPU, {"arena_extend_strategy": "kSameAsRequested"})]).providers


class FakeRuntime:
    """A build for GPUs on a machine that has none: the runtime says so in a log line, and takes the CPU."""

    def __init__(self, loaded: list[str]) -> None:
        self.loaded, self.asked, self.preloaded = loaded, None, False

    def get_available_providers(self):
        return [*runtimes.GPU, runtimes.CPU]

    get_all_providers = get_available_providers

    def preload_dlls(self):
        self.preloaded = True

    def InferenceSession(self, path, options, providers):
        self.asked = providers
        return self

    def get_providers(self):
        return self.loaded


def test_a_gpu_provider_that_does_not_load_is_an_error(monkeypatch):
    for providers in (["CUDAExecutionProvider"], None):
        fake = FakeRuntime([runtimes.CPU])
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        call = lambda p=providers: runtimes.open_session("m.onnx", p)  # noqa: E731
        refused(call, "CUDAExecutionProvider", "did not load", "by name")
        assert fake.preloaded
    fake = FakeRuntime(["CUDAExecutionProvider", runtimes.CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    assert runtimes.open_session("m.onnx", None) is fake
    assert [name for name, _ in fake.asked] == [*runtimes.GPU, runtimes.CPU]
    runtimes.open_session("m.onnx", [("CUDAExecutionProvider", {"device_id": 1})])
    assert fake.asked == [("CUDAExecutionProvider", {"device_id": 1})]


def test_both_runtimes_together_are_refused(monkeypatch):
    monkeypatch.setattr(runtimes, "_is_installed", lambda distribution: True)
    refused(lambda: runtimes.require("onnxruntime"), "both installed", "uninstall both")


@pytest.mark.gpu
def test_tensors_stay_on_the_gpu(place):
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA device and onnxruntime-gpu")
    session = Session(place.report.path, providers=["CUDAExecutionProvider"], adapters={"two": place.files["two"]})
    got = session.run({name: t.cuda() for name, t in INPUTS.items()}, "two")["logits"]
    assert got.is_cuda
    wanted = place.torch("two")
    assert (got.cpu() - wanted).norm() / wanted.norm() < 1e-2  # TF32


# ── folded weights for a graph of the base ───────────────────────────────────────────────────────────────────────────


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A base file, and two tasks' folded weights."""
    folder, x = tmp_path_factory.mktemp("tasks"), torch.linspace(-1, 1, 96).reshape(3, 32)
    torch.manual_seed(0)
    model = Wide().eval()
    lora_fx.export_onnx(model, x, folder / "base.onnx", external_data=True)
    for name, rule in (("a", Rule(where="up", rank=3)), ("b", Rule(where="*", rank=2))):
        lora_fx.apply(model, rule, x, name=name)
    reference.fill(model)
    wanted = {}
    for name in "ab":
        lora_fx.activate(model, name)
        with torch.no_grad():
            wanted[name] = model(x)
        lora_fx.export_onnx(model, x, folder / f"{name}.onnx", prove=True)
        save_onnx_weights(folder / "base.onnx", folder / f"{name}.onnx", folder / f"{name}.safetensors")
    return folder, x, wanted


def test_tasks_share_a_graph_and_its_weights(tasks):
    folder, x, wanted = tasks
    base = Session(folder / "base.onnx", shared=True)
    (plain,) = base.run(x).values()
    for name in "ab":
        (got,) = base.task(folder / f"{name}.safetensors").run(x).values()
        (own,) = Session(folder / f"{name}.onnx").run(x).values()
        assert compare(own, got, wanted[name].double(), 0.0, torch.float32)
        assert not compare(plain, got, wanted[name].double(), 0.0, torch.float32)
    assert torch.equal(plain, *base.run(x).values())


def test_weights_for_another_graph_are_refused(tasks, tmp_path):
    folder, x, _ = tasks
    other = lora_fx.export_onnx(nn.Linear(32, 64).eval(), x, tmp_path / "other.onnx", check=False).path
    refused(lambda: save_onnx_weights(folder / "base.onnx", other, tmp_path / "w"), "not the same", "same arguments")
    refused(lambda: save_onnx_weights(folder / "base.onnx", folder / "base.onnx", tmp_path / "w"), "the same weights")
    refused(lambda: save_onnx_weights(folder / "base.onnx", tmp_path / "none", tmp_path / "w"), "cannot be read")
    shared = Session(folder / "base.onnx", shared=True)
    (tmp_path / "bad").write_bytes(b"nonsense")
    refused(lambda: shared.task(tmp_path / "bad"), "cannot be read", "save_onnx_weights")
    refused(lambda: Session(folder / "base.onnx").task(folder / "a.safetensors"), "keeps no weights", "shared=True")
    refused(lambda: Session(other, shared=True).task(folder / "a.safetensors"), "graph", "save_onnx_weights")
    assert not (tmp_path / "w").exists()
