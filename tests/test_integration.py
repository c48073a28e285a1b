"""What a transformers or torch user does with a model works on the adapted model, and is the dense model's answer.

B ≠ 0 everywhere, so that the branches act. References are plain torch on the base model with W + s·B·A in place of W.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare, run, worst
from lora_fx.errors import CaptureError
from lora_fx.export.adapters.pretrained import MARK
from lora_fx.graph.capture import Inputs, normalize_inputs, output_tensors, recorded
from lora_fx.model.classes import is_wired
from tests import reference
from tests.reference import EVERYTHING
from tests.zoo import call, case

#: decoder, decoder with Conv1D and a tied head, encoder-decoder, MoE in a loop / as a batched product / as grouped_mm
GENERATING = ["llama", "gpt2", "t5", "mixtral-eager", "olmoe-batched", "qwen3-moe-grouped"]
TRANSFORMERS = [*GENERATING, "bert", "vit"]
DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"
DISPATCHED = ["native-mha", "native-encoder", "native-lstm"]
COPIED = ["llama", "gpt2", "t5", "olmoe-batched", *DISPATCHED, "native-conv2d", "native-tied"]
NO_FLOAT64 = {"qwen3-moe-grouped"}  # CPU kernels of grouped_mm

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning:transformers", "ignore:.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def by_turns(names: Sequence[str], ways: Sequence[Any]) -> list[Any]:
    """Each name with one of the ways; in the deep profile with each."""
    chosen = [(name, way) for n, name in enumerate(names) for way in (ways if DEEP else [ways[n % len(ways)]])]
    return [pytest.param(name, way, id=f"{name}-{way}") for name, way in chosen]


@cache
def _built(name: str, double: bool) -> tuple[nn.Module, nn.Module, Inputs]:
    model, inputs = case(name).build()
    if double and name not in NO_FLOAT64:
        model, inputs = reference.in_double(model, inputs)
    inputs = normalize_inputs(model, inputs)
    base = copy.deepcopy(model)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        lora_fx.apply(model, EVERYTHING, inputs)
    reference.fill(model)
    return base, model, inputs


def built(name: str, double: bool = False) -> tuple[nn.Module, nn.Module, Inputs]:
    """The base, the adapted model (B ≠ 0) and the inputs: copies of their own."""
    base, model, inputs = _built(name, double)
    return copy.deepcopy(base), copy.deepcopy(model), inputs


def dense(base: nn.Module, model: nn.Module) -> nn.Module:
    """The base model whose weights hold W + s·B·A, written by plain torch."""
    full = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in reference.dense_weights(model).items():
            full.get_parameter(name).copy_(weight)
    return full


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_same_function(a: list, b: list, exact: list) -> None:
    """a is b, up to a small multiple of b's own distance from the exact result."""
    reports = [compare(x, y, z, distance(y, z), x.dtype) for x, y, z in zip(a, b, exact, strict=True)]
    assert worst(reports), str(worst(reports))


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def labelled(name: str, inputs: Inputs) -> dict:
    batch = dict(inputs.kwargs)
    labels = torch.tensor([0, 1]) if name in ("bert", "vit") else batch.get("decoder_input_ids", batch.get("input_ids"))
    return {**batch, "labels": labels}


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, outputs: list) -> list:
    return list(torch.autograd.grad(sum(t.double().square().mean() for t in outputs), list(factors(model).values())))


# ── transformers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", GENERATING)
def test_generate_gives_the_dense_models_tokens_with_and_without_cache(name):
    base, model, inputs = built(name, double=True)
    ids = inputs.kwargs["input_ids"]

    def tokens(model, cache):
        return model.generate(
            ids, use_cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )

    full = tokens(dense(base, model), True)
    assert torch.equal(tokens(model, True), full)
    assert torch.equal(tokens(model, False), full)
    assert torch.equal(tokens(lora_fx.fold(model, copy=True), True), full)
    assert not torch.equal(tokens(base, True), full)


@pytest.mark.parametrize("name, reentrant", by_turns(TRANSFORMERS, [False, True]))
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    _, model, inputs = built(name)
    batch = labelled(name, inputs)
    if reentrant and name == "vit":
        pytest.skip("pixels go through no embedding that enable_input_require_grads could hook")
    if name == "t5":  # its bias table is read in every layer: recomputing adds the shares up in another order
        model = model.double()
    model.train()

    def grads():
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in factors(model).values())]

    plain = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = grads()
    if name == "t5":
        eps = torch.finfo(torch.float64).eps
        assert all(compare(x, y, y, eps, y.dtype) for x, y in zip(again, plain, strict=True))
    else:
        assert same(again, plain)
    assert all(bool(g.any()) for g in plain)


class Samples(torch.utils.data.Dataset):
    def __init__(self, name: str, inputs: Inputs) -> None:
        self.batch = {k: v for k, v in labelled(name, inputs).items() if isinstance(v, torch.Tensor)}

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict:
        return {k: v[i % 2] for k, v in self.batch.items()}


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral-eager", "vit"])
def test_trainer_moves_the_factors_alone_and_resumes_from_its_checkpoint(name, tmp_path):
    # mixtral and vit: transformers saves them under other keys, which its own Trainer cannot read back
    from transformers import Trainer, TrainingArguments

    base, _, inputs = built(name)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=4, learning_rate=0.02,
        seed=0, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def trainer():
        model = lora_fx.apply(copy.deepcopy(base), EVERYTHING, inputs)
        return Trainer(model, arguments, train_dataset=Samples(name, inputs))

    first = trainer()
    before = reference.bits(first.model)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = reference.bits(first.model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == set(factors(first.model))
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert reference.same_bits(reference.bits(second.model), after)
    kept = _keys(tmp_path / "checkpoint-3")
    assert kept - {MARK, *dict(base.named_buffers())} == set(factors(first.model))  # nothing of the base


@pytest.mark.parametrize("name, rank", by_turns(TRANSFORMERS, [1, 2]))
def test_an_adapted_model_that_is_saved_whole_is_the_base_and_holds_the_factors(name, rank, tmp_path):
    # rank 1: transformers would split the experts' factors into gate and up, along the rank
    from safetensors.torch import load_file

    base, _, inputs = built(name)
    model = lora_fx.apply(copy.deepcopy(base), Rule(when=EVERYTHING.when, rank=rank), inputs)
    reference.fill(model)
    type(model).save_pretrained(model, tmp_path)
    plain, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert reference.same_bits(reference.bits(plain), reference.bits(base))
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == set(factors(model))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[key], factor) for key, factor in factors(model).items())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_saved_folded_model_is_a_plain_checkpoint_with_the_same_outputs_bitwise(name, tmp_path):
    base, model, inputs = built(name)
    lora_fx.fold(model)
    model.save_pretrained(tmp_path / "folded")
    base.save_pretrained(tmp_path / "base")
    plain, info = type(base).from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not any(info.values())
    base.load_state_dict(plain.state_dict())  # the reloaded config chooses other attention and expert kernels
    assert same(run(base, inputs), run(model, inputs))
    assert _keys(tmp_path / "folded") == _keys(tmp_path / "base")


def _keys(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["gpt2", "t5", "qwen2"])
def test_a_head_split_from_its_embedding_survives_saving_and_loading(name, tmp_path):
    # The config goes on saying that they are tied. transformers reads both and keeps them apart; and it must not be
    # changed here: T5 scales its decoder's outputs by that very setting.
    base, _, inputs = built(name)
    model = lora_fx.apply(copy.deepcopy(base), Rule(role="lm_head", rank=2, alpha=3), inputs)
    reference.fill(model)
    adapted = run(model, inputs)
    lora_fx.fold(model)
    model.save_pretrained(tmp_path)
    plain, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    folded = run(plain, inputs)
    assert same(folded, run(model, inputs))
    assert distance(folded[0], adapted[0]) < distance(run(base, inputs)[0], adapted[0]) / 1000
    assert torch.equal(plain.get_input_embeddings().weight, base.get_input_embeddings().weight)


# ── torch.compile ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about what it captures
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe-batched", "native-mha", "native-encoder", *["t5"] * DEEP])
def test_torch_compile_makes_one_graph_forward_and_backward(name):
    _, model, inputs = built(name)
    wide = copy.deepcopy(model).double()
    eager = output_tensors(inputs.call(model))
    exact = output_tensors(reference.in_double(wide, inputs)[1].call(wide))
    with _compiled(model, "aot_eager") as (compiled, counter):
        got = output_tensors(inputs.call(compiled))
        output_tensors(inputs.call(compiled))
        assert counter.frame_count == 1
    assert_same_function(got, eager, exact)
    assert_same_function(gradients(model, got), gradients(model, eager), gradients(wide, exact))


@contextlib.contextmanager
def _compiled(model: nn.Module, backend: str):
    """Compiled without a graph break, and with a counter of graphs."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    yield torch.compile(model, backend=counter, fullgraph=True), counter
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("which", ["base", "adapted"])
def test_new_lengths_cost_the_adapted_model_no_more_graphs_than_the_base(which):
    base, model, _ = built("native-encoder")
    with _compiled(base if which == "base" else model, "eager") as (compiled, counter):
        for length in (5, 7, 9, 11):
            compiled(torch.randn(2, length, 16))
        assert counter.frame_count == 2  # the first length, and any other


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_what_the_eager_model_does():
    _, model, inputs = built("native-bypassed-linear")
    wide = copy.deepcopy(model).double()
    eager = output_tensors(inputs.call(model))
    exact = output_tensors(reference.in_double(wide, inputs)[1].call(wide))
    with _compiled(model, "inductor") as (compiled, counter):
        got = output_tensors(inputs.call(compiled))
        assert counter.frame_count == 1
    assert_same_function(got, eager, exact)
    assert_same_function(gradients(model, got), gradients(model, eager), gradients(wide, exact))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "olmoe-batched"])
def test_layers_compiled_one_by_one_compile_once(name):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    _, model, inputs = built(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    run(model, inputs)
    assert len(model.model.layers) == 2 and counter.frame_count == 1
    torch._dynamo.reset()


def test_layers_of_one_code_share_one_class():
    _, model, _ = built("llama")
    made = {type(m) for m in model.modules() if hasattr(type(m), "_lora_fx")}
    assert {cls.__name__ for cls in made} == {"Linear", "Embedding"}
    assert len(made) == 2  # 15 linear layers and an embedding


# ── copies, checkpoints, verbs ───────────────────────────────────────────────────────────────────────────────────────


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("name, state", by_turns(COPIED, ["adapted", "deactivated", "folded"]))
def test_a_copy_is_the_same_model_with_parameters_of_its_own(name, state):
    _, model, inputs = built(name)
    adapted = run(model, inputs)
    if state == "folded":
        lora_fx.fold(model)
    elif state == "deactivated":
        lora_fx.deactivate(model)
    outputs = run(model, inputs)
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save):
        twin = duplicate(model)
        assert same(run(twin, inputs), outputs)
        assert reference.classes(twin) == reference.classes(model)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert len(list(twin.parameters())) == len(list(model.parameters()))
        if state != "adapted":
            (lora_fx.unfold if state == "folded" else lambda m: lora_fx.activate(m, "default"))(twin)
            assert same(run(twin, inputs), adapted)
    assert same(run(model, inputs), outputs)


def test_another_process_reads_the_pickled_model(tmp_path):
    _, model, inputs = built("native-encoder")
    torch.save((model, inputs, run(model, inputs)), tmp_path / "model.pt")
    script = (
        "import sys, torch; torch.set_num_threads(1); from lora_fx.checks.verification import run\n"
        "model, inputs, outputs = torch.load(sys.argv[1], weights_only=False)\n"
        "assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), outputs, strict=True))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, timeout=120)


@pytest.mark.parametrize("name", [*TRANSFORMERS, *DISPATCHED])
def test_a_base_checkpoint_loads_by_its_own_keys(name):
    base, model, inputs = built(name)
    weights = {key: torch.full_like(t, 0.01) if t.is_floating_point() else t for key, t in base.state_dict().items()}
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) == set(factors(model))
    assert [key for key in model.state_dict() if "_lora_" not in key] == list(weights)
    assert all(torch.equal(model.state_dict()[key], t) for key, t in weights.items())
    lora_fx.deactivate(model)
    base.load_state_dict(weights)
    assert same(run(model, inputs), run(base, inputs))


def test_an_adapted_state_dict_loads_strictly_into_another_adapted_model():
    base, model, inputs = built("gpt2")
    other = lora_fx.apply(copy.deepcopy(base), EVERYTHING, inputs)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["llama", "native-mha"])
def test_adapters_of_two_names_are_chosen_and_removed_one_by_one(name):
    base, _, inputs = built(name, double=True)
    base.requires_grad_(False)  # torch takes its fused path, which rounds in another order, for frozen weights only
    model, classes, plain = copy.deepcopy(base), reference.classes(base), run(base, inputs)
    lora_fx.apply(model, Rule(where="*q_proj* | *in_proj*", rank=2, alpha=3), inputs, name="one")
    lora_fx.apply(model, EVERYTHING, inputs, name="two")
    lora_fx.apply(model, Rule(where="*o_proj* | *out_proj*", rank=1), inputs, name="one")
    reference.fill(model)
    assert set(lora_fx.adapters(model)) == {"one", "two"}
    for active in (("one", "two"), ("one",), ("two",), ()):
        lora_fx.activate(model, *active)
        expected = reference.run_dense(base, reference.dense_weights(model), inputs)
        # the whole chain of layers rounds, in two orders: one rounding step of each weight says how much that is
        nudged = {k: w * (1 + torch.finfo(w.dtype).eps) for k, w in reference.dense_weights(model).items()}
        moved = reference.run_dense(base, nudged, inputs) if active else expected
        assert_same_function(run(model, inputs), expected, moved)
        assert all(any(f"_lora_{n}" in key for n in active) for key in factors(model))
    assert same(run(model, inputs), plain)
    lora_fx.remove(model, "two")
    assert set(lora_fx.adapters(model)) == {"one"}
    lora_fx.remove(model, "one")
    assert reference.classes(model) == classes
    assert reference.same_bits(reference.bits(model), reference.bits(base))
    assert not [key for m in model.modules() for key in vars(m) if "lora" in key]


# ── precision and parallelism ────────────────────────────────────────────────────────────────────────────────────────


def in_bfloat16(inputs: Inputs) -> Inputs:
    def cast(leaf):
        return leaf.bfloat16() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return Inputs(*pytree.tree_map(cast, (inputs.args, inputs.kwargs)))


def test_removed_it_leaves_a_library_model_the_attributes_that_it_had():
    model, inputs = case("llama").build()
    model._weight_conversions = kept = []  # as of one that from_pretrained has made
    for had in (True, False):
        before = [set(vars(module)) for module in model.modules()]
        lora_fx.remove(lora_fx.apply(model, Rule(where="*", rank=2), inputs, check=False), "default")
        assert [set(vars(module)) for module in model.modules()] == before
        assert vars(model).get("_weight_conversions") is (kept if had else None)
        if had:
            del model._weight_conversions


@pytest.mark.parametrize("name, how", by_turns(COPIED[:-1], ["autocast", "cast after apply", "float32 factors"]))
def test_bfloat16_is_as_near_the_exact_model_as_the_dense_one_is(name, how):
    base, model, inputs = built(name)
    context = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
    if how == "cast after apply":
        model, base, inputs = model.bfloat16(), base.bfloat16(), in_bfloat16(inputs)
    elif how == "float32 factors":
        base, inputs = base.bfloat16(), in_bfloat16(inputs)
        model = lora_fx.apply(copy.deepcopy(base), EVERYTHING, inputs)
        reference.fill(model)
    dtype = torch.bfloat16 if how == "cast after apply" else torch.float32
    assert {p.dtype for p in factors(model).values()} == {dtype}
    with context:
        try:
            run(base, inputs)
        except CaptureError as error:
            pytest.skip(f"the base model itself does not run so on this CPU: {error}")
        got, full = run(model, inputs), run(dense(base, model), inputs)
    wide, wide_inputs = reference.in_double(copy.deepcopy(base), inputs)
    exact = reference.run_dense(wide, reference.dense_weights(model), wide_inputs)
    assert_same_function(got[:1], full[:1], exact[:1])
    assert distance(run(wide, wide_inputs)[0], exact[0]) > 4 * distance(full[0], exact[0])  # a lost branch would show
    with context:
        outputs = output_tensors(inputs.call(model.train()))
    grads = gradients(model, outputs)
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)


def test_the_model_moves_between_dtypes_with_its_adapters():
    _, model, inputs = built("native-encoder")
    outputs = run(model, inputs)
    model.double().float()
    assert same(run(model, inputs), outputs)
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


_PARALLEL = """
import copy, os, sys, warnings
from safetensors.torch import load_file
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

torch.set_num_threads(1)
path, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
import lora_fx
from lora_fx.graph.capture import output_tensors

cpu = torch.device("cpu")

def outputs_of(model, inputs):
    outputs = output_tensors(inputs.call(model))
    sum(t.square().mean() for t in outputs).backward()
    return [t.detach() for t in outputs]

def gradients(model):
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    return [full(p.grad) for p in model.parameters() if p.grad is not None]

def step(model, inputs):
    return [*outputs_of(model, inputs), *gradients(model)]

def same(found, expected):
    assert len(found) == len(expected) and all(map(torch.equal, found, expected)), type(model).__name__

def save(model, name):
    lora_fx.save_adapter(model, f"{path}.{rank}.{name}", peft=False, beside="ignore")

def same_files(one, other):
    one, other = (load_file(f"{path}.{rank}.{name}/adapter_model.safetensors") for name in (one, other))
    same([one[name] for name in other], other.values())

def refused(call, remedy):
    try:
        call()
    except lora_fx.LoraFxError as error:
        assert remedy in error.remedy, error
    else:
        raise AssertionError("done with shards")

for model, inputs in torch.load(path, weights_only=False):
    save(model, "whole")
    alone = step(copy.deepcopy(model), inputs)
    ddp = step(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), inputs)
    # FSDP1 makes one flat parameter of a unit's own, so that all or none require gradients.
    trained = copy.deepcopy(model).requires_grad_(True)
    units = {type(layer) for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m}
    fsdp1 = FullyShardedDataParallel(
        copy.deepcopy(trained), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy(units), device_id=cpu
    )
    same(outputs_of(fsdp1, inputs), outputs_of(trained, inputs))
    refused(lambda: save(fsdp1, "refused"), "summon_full_params")
    refused(lambda: lora_fx.fold(fsdp1), "in one process")
    for other in (fsdp1, trained):  # whether the gradients are alike a step shows
        torch.optim.SGD(other.parameters(), 0.25).step()
    with FullyShardedDataParallel.summon_full_params(fsdp1):
        same([*fsdp1.parameters()], [*trained.parameters()])
        save(fsdp1, "summoned")
    save(trained, "trained")
    same_files("summoned", "trained")
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)][:1]:
        if type(model).__name__.startswith("Llama"):  # each adapted module a unit of its own: a class derived from ours
            layers = [*(m for m in model.modules() if isinstance(m, nn.Linear)), *layers]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    sharded = step(fully_shard(model, mesh=mesh), inputs)
    same(ddp, alone)
    same(sharded, alone)
    refused(lambda: save(model, "refused"), "unshard()")
    refused(lambda: lora_fx.fold(model), "in one process")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    save(model, "gathered")
    same_files("gathered", "whole")
dist.destroy_process_group()
"""


def test_two_processes_with_ddp_and_fsdp_get_one_processs_outputs_and_gradients_bitwise(tmp_path):
    names = ["llama", "native-tied", "native-mha", "native-encoder", "native-lstm", "olmoe-batched"]
    torch.save([built(name, double=True)[1:] for name in names], tmp_path / "models.pt")
    (tmp_path / "worker.py").write_text(_PARALLEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": root}
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "models.pt")]
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(error[-2000:] for error in errors)


@pytest.mark.parametrize("name", ["llama", "olmoe-batched", *DISPATCHED, "native-bypassed-linear"])
def test_two_threads_get_the_same_bits(name):
    _, model, inputs = built(name)
    expected, wrong = run(model, inputs), []

    def work() -> None:
        with torch.no_grad():
            for _ in range(8):
                if not same(output_tensors(inputs.call(model)), expected):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ── what happens to a module after apply ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "path", "attribute", "value"),
    [
        ("native-conv2d", "0", "stride", (2, 2)),
        ("native-conv2d", "0", "dilation", (2, 2)),
        ("native-conv2d", "0", "padding_mode", "circular"),
        ("native-padding", "0", "max_norm", None),
    ],
)
def test_an_attribute_changed_after_apply_takes_effect(name, path, attribute, value):
    base, model, inputs = built(name, double=True)
    before = run(model, inputs)
    for each in (base, model):
        setattr(each.get_submodule(path), attribute, value)
    expected = reference.run_dense(base, reference.dense_weights(model), inputs)
    nudged = {k: w * (1 + torch.finfo(w.dtype).eps) for k, w in reference.dense_weights(model).items()}
    got = run(model, inputs)
    assert_same_function(got, expected, reference.run_dense(base, nudged, inputs))
    assert value is None or got[0].shape != before[0].shape or not torch.equal(got[0], before[0])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain, self.shift = nn.Linear(5, 7), 1.0, None

    def forward(self, x):
        return F.linear(x, self.inner.weight, self.shift) * self.gain


def test_a_plain_attribute_and_a_parameter_set_after_apply_take_effect():
    x = torch.randn(3, 5)
    model = lora_fx.apply(Scaled(), Rule(where="*", rank=2), x)
    reference.fill(model)
    before = model(x)
    model.gain = 2.0
    assert torch.equal(model(x), 2 * before)
    model.shift = nn.Parameter(torch.ones(7))
    after, wanted = model(x).detach(), 2 * (before + 1).detach()
    assert compare(after, wanted, wanted, 0.0, wanted.dtype)  # one rounding of float32 is the floor


def test_hooks_on_adapted_modules_run():
    _, model, inputs = built("llama")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    seen = []
    for linear in linears:
        linear.register_forward_pre_hook(lambda module, args: seen.append(("before", module)))
        linear.register_forward_hook(lambda module, args, out: seen.append(("after", module)))
    run(model, inputs)
    assert {(when, module) for when in ("before", "after") for module in linears} == set(seen)


@pytest.mark.parametrize("hooked", ["before apply", "after apply"])
def test_forwards_that_accelerate_replaced_keep_their_hook_and_gain_the_branch(hooked):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    ran = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            ran.append(module)
            return args, kwargs

    base, _, inputs = built("llama", double=True)
    model = copy.deepcopy(base)

    def hook() -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                add_hook_to_module(module, Counting())

    steps = [hook, lambda: lora_fx.apply(model, EVERYTHING, inputs)]
    for step in steps if hooked == "before apply" else reversed(steps):
        step()
    reference.fill(model)
    weights = reference.dense_weights(model)
    expected = reference.run_dense(base, weights, inputs)
    moved = reference.run_dense(base, {k: w * (1 + torch.finfo(w.dtype).eps) for k, w in weights.items()}, inputs)
    assert_same_function(run(model, inputs), expected, moved)
    ran.clear()
    inputs.call(model)
    assert len(ran) == 15
    # What accelerate kept is the forward of that time. It must not outlive a fold, nor add the branch a second time.
    for change in (lora_fx.fold, lora_fx.unfold, lambda m: lora_fx.activate(lora_fx.deactivate(m), "default")):
        change(model)
        assert_same_function(run(model, inputs), expected, moved)
    for module in model.modules():
        remove_hook_from_module(module)
    assert_same_function(run(model, inputs), expected, moved)


def test_torch_export_of_an_adapted_model_has_the_branch():
    _, model, inputs = built("native-bypassed-linear", double=True)
    program = torch.export.export(model, inputs.args)
    with recorded():
        assert same(output_tensors(program.module()(*inputs.args)), output_tensors(inputs.call(model)))
    assert call(model, inputs.args[0]).shape == program.module()(*inputs.args).shape
    assert is_wired(model)
