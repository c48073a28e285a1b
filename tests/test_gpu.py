"""The laws where they are used: on a CUDA device, in float32 and bfloat16, in streams, compiled."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import run
from lora_fx.deltas import exact_sum, one_pass
from lora_fx.deltas.fused_sum import FOLDS, FusedWay
from lora_fx.deltas.triton_route import BRANCHES
from lora_fx.graph.capture import Inputs, no_fast_paths, normalize_inputs
from lora_fx.model.inventory import inventory
from lora_fx.passes import fold as folding
from tests import reference
from tests.reference import EVERYTHING
from tests.zoo import case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("default::UserWarning"),  # what torch advises depends on the card
]

CASES = [
    "llama",
    "gpt2",
    "t5",
    "bert",
    "vit",
    "mixtral-eager",
    "qwen3-moe-grouped",
    "native-mha",
    "native-conv2d",
    "native-lstm",
]


def on_device(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Inputs]:
    model, inputs = case(name).build()
    inputs = normalize_inputs(model, inputs)

    def move(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to("cuda", dtype) if leaf.is_floating_point() else leaf.to("cuda")

    args, kwargs = pytree.tree_map(move, (inputs.args, inputs.kwargs))
    return model.to("cuda", dtype).requires_grad_(False), Inputs(args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_laws_hold_on_cuda(name, dtype):
    model, inputs = on_device(name, dtype)
    base = copy.deepcopy(model)
    with no_fast_paths():
        before = run(base, inputs)
        lora_fx.apply(model, EVERYTHING, inputs)  # the self-check runs here
        assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), before, strict=True))
    adapters = reference.distinct_adapters(model)
    assert {a.A.device.type for a in adapters} == {"cuda"} and {a.A.dtype for a in adapters} == {torch.float32}
    reference.fill(model)
    state = reference.bits(model)
    if name != "qwen3-moe-grouped":  # its kernel takes no float64, which verify's reference needs
        assert lora_fx.verify(model, lora_fx.fold(model, copy=True), inputs)
    lora_fx.fold(model)
    assert reference.classes(model) == reference.classes(base)
    lora_fx.unfold(model)
    assert reference.same_bits(reference.bits(model), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("final", [False, True], ids=["undoable", "final"])
def test_a_fold_and_an_unfold_wait_for_the_device_twice_each(monkeypatch, dtype, final):
    """As torch itself counts it, on a weight of 64 blocks."""
    monkeypatch.setattr(exact_sum, "_LARGE", 2**14)
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 64)).to("cuda", dtype)
    lora_fx.apply(model, Rule(where="*", rank=8), torch.randn(2, 1024, device="cuda", dtype=dtype))
    reference.fill(model)
    FOLDS.runs_on(torch.device("cuda", torch.cuda.current_device()))  # looks at it, once in a process
    for verb in [lambda: lora_fx.fold(model, final=final), *([] if final else [lambda: lora_fx.unfold(model)])]:
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                verb()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        assert len([w for w in caught if "synchronizing" in str(w.message)]) <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_kernels_of_one_pass_are_the_branch_and_its_gradients(monkeypatch, dtype, dropout):
    """As large as they are taken, beside torch's ops on the same numbers, with the same elements dropped."""
    assert BRANCHES.runs_on(torch.device("cuda", torch.cuda.current_device()))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1536), torch.nn.Linear(1536, 1024)).to("cuda", dtype)
    x = torch.randn(4, 2048, 1024, device="cuda", dtype=dtype).requires_grad_()
    lora_fx.apply(model, Rule(where="*", rank=8, dropout=dropout), x.detach()[:1, :8])
    reference.fill(model)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    taken, honest = [], one_pass.matmul
    monkeypatch.setattr(one_pass, "matmul", lambda *args: taken.append(1) or honest(*args))

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        y = model.train()(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), trained)]

    ours = gradients()
    assert taken == [1, 1] and all(map(torch.equal, ours, gradients()))
    monkeypatch.setattr(one_pass, "takes", lambda *args: False)
    for own, plain in zip(ours, gradients(), strict=True):  # some roundings of the dtype on each way
        assert float((own - plain).norm() / plain.norm()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.02, 1.0, 1e4], ids=["places", "steps", "numbers"])
def test_a_fold_by_kernels_gives_the_bits_of_torchs_route(monkeypatch, dtype, size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 700, bias=False), torch.nn.Linear(700, 34, bias=False))
    model = model.to("cuda", dtype)
    lora_fx.apply(model, Rule(where="*", rank=8), torch.randn(2, 1024, device="cuda", dtype=dtype))
    reference.fill(model)
    with torch.no_grad():
        for layer in model:
            layer.weight_lora_default.B.mul_(size)
            layer.weight[:3] = torch.tensor([[0.0], [-0.0], [float(torch.finfo(dtype).smallest_normal) / 4]])
    state, plain = reference.bits(model), copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setitem(FOLDS.decided, model[0].weight.device, False)
        lora_fx.fold(plain)
    final = lora_fx.fold(model, copy=True, final=True)
    lora_fx.fold(model)
    ways = [way for record in inventory(model).records.values() for way in record.ways.values()]
    assert len(ways) == 2 and all(isinstance(way, FusedWay) for way in ways)
    for mine, by_kernels, theirs in zip(model, final, plain, strict=True):
        assert torch.equal(mine.weight.cpu().view(torch.uint8), theirs.weight.cpu().view(torch.uint8))
        assert torch.equal(by_kernels.weight.cpu().view(torch.uint8), theirs.weight.cpu().view(torch.uint8))
    assert folding.kept_bytes(model) <= folding.kept_bytes(plain)
    moved = copy.deepcopy(model).cpu()
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)
    lora_fx.unfold(moved)
    assert all(torch.equal(a.weight, b.weight.cpu()) for a, b in zip(moved, model, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_training_lowers_the_loss(compiled):
    model, inputs = on_device("llama", torch.bfloat16)
    lora_fx.apply(model, Rule(role="attention.* | mlp.*", rank=4), inputs)
    step = torch.compile(model, fullgraph=True) if compiled else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    labels = inputs.kwargs["input_ids"]
    for _ in range(20):
        loss = step(**inputs.kwargs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
