"""Where parameters live, and what they are: put away by accelerate, in parts, without a storage, no plain tensor."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.attention.flex_attention import flex_attention

import lora_fx
from lora_fx import Plan, Rule
from lora_fx.checks.verification import copied, scatter
from lora_fx.errors import AdapterError, CaptureError, EquivalenceError, ExportError, FoldError, LoraFxError, PlanError
from lora_fx.model.inventory import inventory

EVERYTHING = Rule(where="*", rank=2)


class Net(nn.Module):
    """An embedding, a tower with a parameter of its own, a tied head, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.down = nn.Linear(8, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.relu(self.up(self.embed(ids))).mT).mT
        return self.head(self.down(self.lstm(y)[0]))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def built(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def moved(model: nn.Module) -> nn.Module:
    """With θ away from where it started."""
    generator = torch.Generator().manual_seed(1)
    for storage in inventory(model).storages():
        for adapter in storage.adapters:
            scatter(adapter, storage.weight, generator, 0.5)
    return model


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "_lora_" in name}


def bits(model: nn.Module) -> dict[str, Any]:
    """Which tensors a model holds, and the classes of its modules."""
    held = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return held | {f"class of {name}": type(m) for name, m in model.named_modules()}


IDS = torch.arange(8).reshape(2, 4) % 11


# ── put away by accelerate ───────────────────────────────────────────────────────────────────────────────────────────


def _offload(how: str, model: nn.Module, folder: Any, disk: Any = ("up", "lstm"), **options: Any) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True, **options)
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), torch.device("cpu"), **options)
    places = {name: "disk" if name in disk else "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, places, offload_dir=str(folder), **options)


def _untied(model: nn.Module) -> nn.Module:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("how", "kind"), [("cpu", "lora"), ("disk", "lora"), ("map", "lora"), ("cpu", "dora")])
def test_a_model_that_accelerate_offloads_is_adapted_before_and_after(how, order, kind, tmp_path):
    rules = [Rule(where="embed|lstm*"), Rule(where="*", rank=2, kind=kind)] if kind == "dora" else EVERYTHING
    plain, model = _untied(built()), _untied(built())
    lora_fx.apply(plain, rules, IDS)
    if order == "before":
        _offload(how, model, tmp_path)
        held = bits(model)
        lora_fx.plan(model, rules, IDS)
        assert bits(model) == held
    lora_fx.apply(model, rules, IDS)
    moved(plain)
    for name, parameter in factors(model).items():
        parameter.data.copy_(factors(plain)[name])
    if order == "after":
        _offload(how, model, tmp_path)
    assert not any(p.is_meta for p in factors(model).values())
    for _ in range(2):
        assert torch.equal(model(IDS), plain(IDS))
        model(IDS).square().sum().backward()
        plain(IDS).square().sum().backward()
    for name, parameter in factors(model).items():
        assert torch.equal(parameter.grad, factors(plain)[name].grad), name
        parameter.data.add_(0.125)  # is no part of what accelerate has mapped from the disk
    lora_fx.deactivate(model)
    accelerate_free = built()
    assert torch.equal(model(IDS), _untied(accelerate_free).requires_grad_(False)(IDS))
    lora_fx.activate(model, "default")
    lora_fx.save_adapter(model, tmp_path / "saved", peft=False)
    again = lora_fx.load_adapter(_offload("cpu", _untied(built()), tmp_path), tmp_path / "saved", IDS)
    expected = model(IDS)
    assert torch.equal(again(IDS), expected)
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)  # the factors are those that were trained


def test_what_is_offloaded_is_refused_by_name_where_its_numbers_are_needed(tmp_path):
    import accelerate

    model = _offload("cpu", moved(lora_fx.apply(built(), EVERYTHING, IDS)), tmp_path)
    expected, held = model(IDS), bits(model)
    for verb, error in (
        (lambda: lora_fx.fold(model), FoldError),
        (lambda: lora_fx.fold(model, final=True), FoldError),
        (lambda: lora_fx.switch(model, "default"), FoldError),
        (lambda: lora_fx.certify(model, IDS), CaptureError),
        (lambda: lora_fx.verify(model, model, IDS), CaptureError),
        (lambda: lora_fx.export_onnx(model, IDS, tmp_path / "model.onnx"), ExportError),
    ):
        with pytest.raises(error, match=r"offloaded by accelerate.*\n.*remove_hook_from_submodules"):
            verb()
        assert bits(model) == held
    assert torch.equal(model(IDS), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), expected)
    lora_fx.fold(model)
    _offload("cpu", model, tmp_path)
    with pytest.raises(FoldError, match="offloaded by accelerate"):
        lora_fx.unfold(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    lora_fx.unfold(model)
    assert torch.equal(model(IDS), expected)


def test_the_check_of_an_offloaded_model_leaves_what_is_put_away_as_it_was(tmp_path):
    model = _offload("cpu", built(), tmp_path)
    kept = {name: module._hf_hook.weights_map for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    lora_fx.apply(model, EVERYTHING, IDS)
    for name, tensor in built().state_dict().items():
        path, _, attribute = name.rpartition(".")
        assert torch.equal(kept[path][attribute], tensor), name
        assert model.get_submodule(path)._hf_hook.weights_map is kept[path]


def test_what_was_tied_before_it_was_put_away_has_one_adapter(tmp_path):
    model = _offload("cpu", built(), tmp_path)
    model(IDS)  # accelerate leaves another parameter on meta after each forward
    lora_fx.apply(model, Rule(where="embed", rank=2), IDS)
    assert set(lora_fx.adapters(model)["default"]) == {"embed.weight", "head.weight"}
    assert model.embed.weight_lora_default is model.head.weight_lora_default
    parted = _offload("map", built(), tmp_path, disk=("embed", "head"))
    with pytest.raises(PlanError, match=r"^head.weight: the weight is tied to another one, and accelerate has parted"):
        lora_fx.apply(parted, Rule(where="head", rank=2), IDS)


def test_a_hook_that_loads_what_is_inside_of_its_module_and_a_graph_with_its_calls_inlined_are_refused(tmp_path):
    model = _offload("cpu", built(), tmp_path, preload_module_classes=["Net"])
    with pytest.raises(CaptureError, match="preload_module_classes"):
        lora_fx.apply(model, EVERYTHING, IDS)
    graph = lora_fx.apply(fx.symbolic_trace(built(Two)), EVERYTHING, torch.ones(3, 6))
    with pytest.raises(LoraFxError, match="the graph of the GraphModule around it"):
        _offload("cpu", graph, tmp_path)
    graph = _offload("cpu", fx.symbolic_trace(built(Two)), tmp_path)
    expected = graph(torch.ones(3, 6))
    assert torch.equal(lora_fx.apply(graph, EVERYTHING, torch.ones(3, 6))(torch.ones(3, 6)), expected)


def test_a_model_that_is_partly_on_meta_keeps_the_names_of_what_is_not():
    model = built(Two)
    model.down.to("meta")
    assert {row.name for row in lora_fx.plan(model, EVERYTHING, torch.ones(3, 6)).rows} == {"up.weight", "down.weight"}


# ── in parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mesh():
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch.distributed is not there")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_is_sharded_is_refused_first_and_by_its_own_name(mesh, tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, styles = torch.ones(3, 6), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    lora_fx.save_adapter(lora_fx.apply(built(Two), EVERYTHING, x), tmp_path / "saved")
    for sharded in (parallelize_module(built(Two), mesh, styles), fully_shard(built(Two), mesh=mesh)):
        held = bits(sharded)
        for verb in (
            functools.partial(lora_fx.apply, rules=EVERYTHING, example_inputs=x),
            functools.partial(lora_fx.apply, rules=EVERYTHING),
            functools.partial(lora_fx.load_adapter, path=tmp_path / "saved"),
            functools.partial(lora_fx.verify, after=sharded, example_inputs=x),
        ):
            with pytest.raises(CaptureError, match=r"^up\.weight: the parameter is sharded.*DTensor"):
                verb(sharded)
        assert bits(sharded) == held
    sharded(x)  # leaves the root's parameters gathered: plain tensors for now
    with pytest.raises(CaptureError, match="sharded by FSDP"):
        lora_fx.apply(sharded, EVERYTHING, x)
    for inputs in (x, None):  # by graph, and by dispatch
        for style in styles:
            model = lora_fx.apply(built(Two), EVERYTHING, inputs)
            expected = model(x)
            with pytest.raises(LoraFxError, match=r"has adapters, and is to get a part.*\n.*fold them before"):
                parallelize_module(model, mesh, {style: styles[style]})
            assert torch.equal(model(x), expected)
    after = fully_shard(lora_fx.apply(built(Two), EVERYTHING, x), mesh=mesh)
    assert torch.equal(after(x), built(Two)(x))
    with pytest.raises(CaptureError, match="cannot be copied"):
        lora_fx.fold(after, copy=True)


def test_shared_factors_that_another_block_has_sharded_are_refused_by_name(mesh):
    from torch.distributed.fsdp import fully_shard

    x, rule = torch.ones(3, 6), Rule(where="*", kind="compacter", rank=4, settings={"n": 2})

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return lora_fx.apply(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), rule, x)

    whole = fully_shard(adapted(), mesh=mesh)
    assert torch.equal(whole(x), adapted()(x))
    model = adapted()
    for block in model:
        fully_shard(block, mesh=mesh)
    with pytest.raises(AdapterError, match=r"(?s)'compacter': .* is sharded.*fully_shard\(model\) alone"):
        fully_shard(model, mesh=mesh)(x)


def test_a_walk_that_puts_each_child_back_leaves_an_adapter_as_it_is():
    """FSDP's and activation checkpointing's wrappers set every child, also those that they do not wrap."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    x = torch.ones(3, 6)
    model = lora_fx.apply(built(Two), Rule(where="*", rank=2, dropout=0.1), x).eval()
    expected = model(x)
    apply_activation_checkpointing(model, check_fn=lambda module: module in (model.up, model.down))
    assert torch.equal(model(x), expected)
    model.train()(x).sum().backward()
    with pytest.raises(AdapterError, match=r"dropout.*it cannot be set"):
        next(m for m in model.modules() if isinstance(m, lora_fx.Adapter)).dropout = nn.Dropout(0.5)


# ── without a storage, or without a graph that can be run again ──────────────────────────────────────────────────────


class SparseCoo(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("links", torch.eye(4).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.links @ super().forward(x)


class SparseCsr(SparseCoo):
    def __init__(self) -> None:
        super().__init__()
        self.links = self.links.to_sparse_csr()


class Mapped(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: self.down(torch.relu(self.up(row))) + row.sum())(x)


class MappedMask(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(4)
        mask = torch.vmap(lambda i: torch.vmap(lambda j: i >= j)(places))(places)
        return mask.float() @ super().forward(x)


class Derived(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda z: super(Derived, self).forward(z).sum())(x)


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (project(x).view(1, 4, 1, 16).transpose(1, 2) for project in (self.q, self.k, self.v))
        return self.out(flex_attention(*heads, score_mod=lambda s, b, h, i, j: s + (i - j)).transpose(1, 2).flatten(2))


class Spectrum(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(super().forward(x))


class ComplexProduct(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down((x.to(torch.complex64) @ self.up.weight.T.to(torch.complex64)).abs())


X = torch.linspace(-1, 1, 24).reshape(4, 6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # flex_attention is slow uncompiled, CSR is in beta
@pytest.mark.parametrize("kind", [SparseCoo, SparseCsr, Mapped, MappedMask, Derived, Flex, Spectrum, ComplexProduct])
def test_a_forward_with_odd_tensors_in_it_is_adapted_certified_and_folded(kind):
    x = torch.linspace(-1, 1, 64).reshape(1, 4, 16) if kind is Flex else X
    model = built(kind)
    lora_fx.apply(model, EVERYTHING, x)
    certificate = lora_fx.certify(model, x)
    assert certificate, certificate
    assert ("Backward does not run" in str(certificate)) == (kind is Flex)  # not on a CPU, says torch
    with torch.no_grad():
        expected = moved(model)(x)
        folded = copied(model) if kind is SparseCoo else model
        lora_fx.fold(folded)
        assert lora_fx.certify(folded, x)
        lora_fx.unfold(folded)
        assert torch.equal(folded(x), expected)


def test_what_runs_inside_of_a_jvp_is_said_not_to_be_measured():
    class Dual(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.jvp(super().forward, (x,), (torch.ones_like(x),))[1]

    certificate = lora_fx.certify(lora_fx.apply(built(Dual), EVERYTHING, X), X)
    assert not certificate and all(certificate.whole)
    assert {row.problem for row in certificate.problems} == {
        "inside of a transform of torch.func it cannot be measured by itself"
    }


def test_verify_sees_the_imaginary_part():
    class Turned(Spectrum):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).conj()

    model = built(Spectrum)
    assert lora_fx.verify(model, built(Spectrum), X)
    assert not lora_fx.verify(model, built(Turned), X)
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64) * 1j)  # a float64 copy keeps it
    model.forward = functools.partial(lambda m, x: Spectrum.forward(m, x) * m.phase, model)
    other = copy.copy(model)
    other.forward = functools.partial(lambda m, x: Spectrum.forward(m, x) * m.phase.real, model)
    assert lora_fx.verify(model, model, X) and not lora_fx.verify(model, other, X)


# ── in a mode in which the model does not run ────────────────────────────────────────────────────────────────────────


class OneRow(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


class Labelled(Two):
    def forward(self, x: torch.Tensor, labels: Any = None) -> torch.Tensor | None:
        if self.training and labels is None:
            assert x.shape[0] > 1, "labels are needed"
            return None
        return super().forward(x)


@pytest.mark.parametrize(("kind", "why"), [(OneRow, "more than 1 value"), (Labelled, "labels are needed")])
def test_a_model_that_does_not_run_in_train_mode_is_checked_in_eval_mode_and_the_plan_says_so(kind, why):
    x = torch.ones(1, 6)
    run = lora_fx.pipeline("apply", EVERYTHING, x)(built(kind))
    assert "In train mode the model does not run" in str(run.facts[Plan]) and why in str(run.facts[Plan])
    certificate = lora_fx.certify(moved(run.model), x)
    assert certificate and why in str(certificate) and len(certificate.whole) == 1
    assert not certificate.gradient_free
    with pytest.raises(CaptureError, match=why):
        lora_fx.verify(run.model.train(), run.model, x)


def test_an_adapted_model_that_raises_where_the_base_does_not_is_refused():
    class Picky(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and not isinstance(self.up.weight, nn.Parameter):
                raise TypeError("no parameter")
            return super().forward(x)

    with pytest.raises(EquivalenceError, match=r"not run where the model with W \+ δ does: TypeError: no parameter"):
        lora_fx.apply(built(Picky), Rule(where="up", rank=2, kind="dora"), X)


# ── weights that are no plain numbers ────────────────────────────────────────────────────────────────────────────────


class Marked(torch.Tensor):
    """A user's subclass."""


class Packed(torch.Tensor):
    """A quantised weight as libraries make them: it has no numbers, and what reads it unpacks it."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor) -> Packed:
        made = torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)
        made.packed = packed
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].packed)
        args, kwargs = torch.utils._pytree.tree_map_only(Packed, lambda t: t.packed.float(), (args, kwargs or {}))
        return func(*args, **kwargs)


_ODD = {
    "Marked": (lambda: nn.Parameter(torch.ones(8, 6).as_subclass(Marked)), "Marked"),
    "Packed": (lambda: nn.Parameter(Packed(torch.ones(8, 6, dtype=torch.int8)), False), "Packed, which is more than"),
    "expanded": (lambda: nn.Parameter(torch.ones(1, 6).expand(8, 6)), "is expanded"),
    "complex": (lambda: nn.Parameter(torch.ones(8, 6, dtype=torch.complex64)), "is complex"),
    "sparse": (lambda: nn.Parameter(torch.ones(8, 6).to_sparse()), "is stored as torch.sparse_coo"),
    "float8": (lambda: nn.Parameter(torch.ones(8, 6).to(torch.float8_e4m3fn), False), "is quantised"),
    "empty": (lambda: nn.Parameter(torch.ones(0, 6)), "has no elements"),
}


@pytest.mark.parametrize("name", _ODD)
def test_a_weight_that_is_no_plain_numbers_is_refused_by_name_and_the_others_are_adapted(name):
    make, why = _ODD[name]
    model = built(Two)
    model.extra = make()
    for rule in (EVERYTHING, Rule(where="extra", rank=2)):
        with pytest.raises(PlanError, match=f"^extra: the weight .*{why}"):
            lora_fx.apply(model, rule, X)
    lora_fx.apply(model, Rule(where="up|down", rank=2), X)
    assert lora_fx.certify(moved(model), X)
    expected = model(X)
    lora_fx.unfold(lora_fx.fold(model))
    assert torch.equal(model(X), expected)


def test_a_weight_that_torch_cannot_record_is_named_and_not_the_inputs():
    model = built(Two)
    model.up.weight = nn.Parameter(torch.ones(8, 6).as_subclass(Marked))
    with pytest.raises(
        CaptureError, match=r"^Two: it runs on the example inputs, but .*up\.weight is a .*Marked: no plain"
    ):
        lora_fx.apply(model, EVERYTHING, X)


def test_a_lazy_buffer_is_refused():
    model = built(Two)
    model.register_buffer("later", nn.UninitializedBuffer())
    with pytest.raises(CaptureError, match=r"^later: the buffer is lazy"):
        lora_fx.apply(model, EVERYTHING, X)


# ── another size than when it was adapted ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["*embed_tokens*", "*lm_head*"])
def test_resizing_an_adapted_vocabulary_is_refused_and_another_models_is_not(where):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(6)[None]
    lora_fx.apply(model, Rule(where=where, rank=2), ids)
    moved(model)
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    for one in (model, copied, model.model) if "embed" in where else (model, copied):
        with pytest.raises(LoraFxError, match="has an adapter for 30 tokens, and is to have 32"):
            one.resize_token_embeddings(32)
        with pytest.raises(LoraFxError, match="and is to have 64"):
            one.resize_token_embeddings(pad_to_multiple_of=64)
    model.resize_token_embeddings(30)
    assert torch.equal(model(ids).logits, expected)
    lora_fx.fold(model)
    lora_fx.fold(model := lora_fx.unfold(model), final=True)
    model.resize_token_embeddings(32)
    assert model(ids).logits.shape[-1] == 32
    lora_fx.apply(model, Rule(where="*q_proj*", rank=2), ids)
    model.resize_token_embeddings(34)
    assert lora_fx.certify(model, ids)


def test_a_weight_that_has_another_shape_since_is_named():
    model = moved(lora_fx.apply(built(Two), EVERYTHING, X))
    model.down.weight.data = torch.ones(7, 8)
    for verb in (lora_fx.fold, functools.partial(lora_fx.certify, example_inputs=X)):
        with pytest.raises(LoraFxError, match=r"^down\.weight: its shape is \(7, 8\), and was \(5, 8\)"):
            verb(model)
    lora_fx.remove(model, "default")
    assert model.down.weight.shape == (7, 8)
