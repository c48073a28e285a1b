"""Adapted models of transformers on disk, in its Trainer, in accelerate, and as their own reference."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare, noise_floors
from lora_fx.errors import AdapterError, FileError, LoraFxError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.export.adapters.pretrained import MARK
from lora_fx.graph.capture import Inputs
from lora_fx.model.inventory import inventory
from tests import reference

SIZE = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
IDS = torch.tensor([[1, 2, 3, 10, 7], [4, 7, 5, 6, 3]])
RULES = (Rule(where="*.[qv]_proj", rank=2, alpha=3, dropout=0.1), Rule(where="*.mlp.*", rank=1, kind="dora"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE, initializer_range=0.2, pad_token_id=0)).save_pretrained(folder)
    return folder


def adapted(base: Path, rules=RULES, name: str = "default", filled: bool = True) -> nn.Module:
    torch.manual_seed(1)
    model = lora_fx.apply(AutoModelForCausalLM.from_pretrained(base), rules, {"input_ids": IDS}, name=name, check=False)
    model.model.norm.weight.requires_grad_(True)
    if filled:
        reference.fill(model)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


# ── save_pretrained, from_pretrained ─────────────────────────────────────────────────────────────────────────────────


def test_what_is_saved_comes_back_adapted_to_the_bit(base, tmp_path):
    model = adapted(base, RULES[:1])
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, TENSORS}
    said = json.loads((tmp_path / CONFIG).read_text())
    assert said["task_type"] == "CAUSAL_LM" and said["base_model_name_or_path"] == str(base)
    again = lora_fx.from_pretrained(AutoModelForCausalLM, tmp_path, {"input_ids": IDS})
    assert torch.equal(logits(again), logits(model)) and lora_fx.adapters(again).keys() == {"default"}
    assert not torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))


def test_peft_and_transformers_read_it(base, tmp_path):
    model = adapted(base, Rule(where="*_proj", rank=2, alpha=3))
    model.model.norm.weight.requires_grad_(False)
    with torch.no_grad():
        model.model.norm.weight.copy_(AutoModelForCausalLM.from_pretrained(base).model.norm.weight)
    model.save_pretrained(tmp_path)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    found = logits(model)
    ((exact, noise),) = noise_floors(model, Inputs((IDS,), {"use_cache": False}), [found])
    for other in (theirs, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert compare(logits(other), found, exact, noise, torch.float32)


def test_several_adapters_come_back_with_those_that_acted(base, tmp_path):
    model = adapted(base, RULES[:1])
    lora_fx.apply(model, Rule(where="*.o_proj", rank=2), {"input_ids": IDS}, name="other", check=False)
    reference.fill(model)
    lora_fx.activate(model, "other")
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert (tmp_path / "all" / "other" / CONFIG).is_file() and (tmp_path / "all" / CONFIG).is_file()
    for folder in ("all", "checkpoint-1"):
        again = lora_fx.from_pretrained(AutoModelForCausalLM, tmp_path / folder, {"input_ids": IDS}, check=False)
        acting = {a.name: a.active for a in inventory(again).adapters}
        assert acting == {"default": False, "other": True}
        lora_fx.activate(again, "default"), lora_fx.activate(model, "default")
        assert torch.equal(logits(again), logits(model))
        lora_fx.activate(model, "other")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(FileError, match="holds the adapters default, other, and name=None"):
        lora_fx.load_adapter(fresh, tmp_path / "checkpoint-1")
    lora_fx.load_adapter(fresh, tmp_path / "checkpoint-1", name="other", check=False)
    with torch.no_grad():
        fresh.model.norm.weight.copy_(model.model.norm.weight)
    assert lora_fx.adapters(fresh).keys() == {"other"} and torch.equal(logits(fresh), logits(model))


def test_what_peft_has_no_word_for_is_in_our_own_format_and_says_so(base, tmp_path):
    model = adapted(base, Rule(where="*.q_proj", rank=2, kind="adalora"))
    with pytest.warns(UserWarning, match="own format, which PEFT refuses: the kind 'adalora'"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(lora_fx.from_pretrained(AutoModelForCausalLM, tmp_path)), logits(model))


def test_a_base_that_is_nowhere_is_said_and_refused(base, tmp_path):
    model = adapted(base, RULES[:1])
    model.name_or_path = ""
    with pytest.warns(UserWarning, match="without its base, and its name_or_path is empty"):
        model.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="from where its base has come"):
        lora_fx.from_pretrained(AutoModelForCausalLM, tmp_path)


def test_what_is_folded_or_removed_is_saved_whole_again(base, tmp_path):
    model = adapted(base)
    lora_fx.fold(model, final=True)
    model.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), logits(model))
    model = adapted(base)
    type(model).save_pretrained(model, tmp_path / "whole")  # the base too, on request
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > (base / "model.safetensors").stat().st_size
    lora_fx.remove(model, "default")
    assert not {"save_pretrained", "load_state_dict"} & vars(model).keys()


def test_options_that_save_otherwise_are_refused(base, tmp_path):
    with pytest.raises(FileError, match="push_to_hub=True"):
        adapted(base).save_pretrained(tmp_path / "no", push_to_hub=True)
    adapted(base).save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()


# ── the Trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def trainer(base: Path, out: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        str(out), max_steps=4, save_steps=1, eval_steps=1, eval_strategy="steps", per_device_train_batch_size=2,
        learning_rate=0.02, seed=0, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        **options,
    )  # fmt: skip
    data = [{"input_ids": IDS[n % 2], "labels": IDS[n % 2]} for n in range(8)]
    return Trainer(adapted(base, filled=False), arguments, train_dataset=data, eval_dataset=data[:2])


def test_a_checkpoint_holds_no_base_and_resumes_to_the_bit(base, tmp_path):
    first = trainer(base, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    first.train()  # the worst: not the last
    model, best = first.model, Path(first.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(best / "model.safetensors", "pt") as file:
        header = len(json.dumps(file.metadata()))
        assert set(file.keys()) == {*trained, MARK} and "model.norm.weight" in trained
    numbers = sum(p.numel() * p.element_size() for p in trained.values())
    assert (best / "model.safetensors").stat().st_size <= numbers + 2 * header + 200 * len(trained)
    kept = load_file(best / "model.safetensors")
    assert all(torch.equal(p, kept[name]) for name, p in trained.items())

    second = trainer(base, tmp_path / "again")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert last.pop(MARK) and all(torch.equal(t, second.model.state_dict()[name]) for name, t in last.items())
    assert any(not torch.equal(t, kept[name]) for name, t in last.items())

    again = lora_fx.from_pretrained(AutoModelForCausalLM, best, {"input_ids": IDS})
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda m: lora_fx.apply(m, Rule(where="*.o_proj", rank=2), {"input_ids": IDS}, check=False),
            "holds no .*o_proj",
        ),
        (lambda m: m.lm_head.weight.requires_grad_(True), "holds no lm_head.weight"),
    ],
    ids=["more sites", "more unfrozen"],
)
def test_a_checkpoint_of_another_model_is_refused_whole(base, tmp_path, change, reason):
    adapted(base).save_pretrained(tmp_path / "checkpoint-1")
    state = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    model = adapted(base, filled=False)
    change(model)
    before = reference.bits(model)
    with pytest.raises(FileError, match=reason):
        model.load_state_dict(state, False)
    assert reference.same_bits(reference.bits(model), before)
    part = {key: tensor for key, tensor in state.items() if key.endswith("lora_default.A")}
    assert model.load_state_dict(part, False).missing_keys  # which is the user's own


def test_a_checkpoint_of_another_rank_is_refused_whole(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "checkpoint-1")
    model = adapted(base, (Rule(where="*.[qv]_proj", rank=4), RULES[1]), filled=False)
    before = reference.bits(model)
    with pytest.raises(FileError, match=r"has the shape \(2, 16\) there, and \(4, 16\) here"):
        model.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), False)
    assert reference.same_bits(reference.bits(model), before)


# ── accelerate ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))


@pytest.mark.parametrize("slim", [False, True])
def test_accelerate_goes_on_to_the_bit(slim, tmp_path):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))

    def start():
        torch.manual_seed(0)
        model = lora_fx.apply(Normed(), Rule(where="*", rank=2), x)
        model[1].weight.requires_grad_(True)
        accelerator = Accelerator(cpu=True)
        if slim:
            lora_fx.adapter_checkpoints(accelerator)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def step(accelerator, model, optimizer):
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        optimizer.step()

    first, second = start(), start()
    step(*first)
    first[0].save_state(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert ("0.weight" in keys) != slim and {"1.weight", "1.running_mean", "0.weight_lora_default.A"} <= keys
    step(*first)
    second[0].load_state(tmp_path)
    step(*second)
    assert reference.same_bits(reference.bits(first[1]), reference.bits(second[1]))
    if slim:
        save_file({k: load_file(tmp_path / "model.safetensors")[k] for k in keys if "_lora_" in k}, tmp_path / "less")
        shutil.move(tmp_path / "less", tmp_path / "model.safetensors")
        with pytest.raises(FileError, match=r"holds no 1\.weight"):
            second[0].load_state(tmp_path)


# ── the reference of preference training ─────────────────────────────────────────────────────────────────────────────


def test_the_reference_is_the_base_to_the_bit_without_memory(base):
    model, plain = adapted(base), AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        model.model.norm.weight.copy_(plain.model.norm.weight)
    model.train()
    before = logits_of(model)
    ref = lora_fx.reference(model)
    assert not [*ref.parameters()] and ref.config is model.config
    state = ref.state_dict()  # by which TRL knows what it has computed with it before
    assert reference.same_bits(state, plain.state_dict())
    assert all(t.data_ptr() == model.state_dict()[key].data_ptr() for key, t in state.items())
    assert torch.equal(logits_of(ref), logits(plain))
    assert all(m.training for m in model.modules()) and not ref.training
    assert torch.equal(logits_of(model), before) and not torch.equal(before, logits(plain))
    for module in ref.modules():
        assert module is ref  # nobody who walks over it finds the model


def as_trainers_load(model, **options):
    """What TRL's trainers do for want of a reference."""
    config = AutoConfig.from_pretrained(model.config._name_or_path)
    wanted = dict(dtype=model.dtype, attn_implementation=model.config._attn_implementation, device_map=None)
    return getattr(transformers, config.architectures[0]).from_pretrained(
        model.config._name_or_path, **{**wanted, "trust_remote_code": False, **options}
    )


def test_inside_its_block_who_loads_the_base_gets_the_reference(base, tmp_path):
    model, plain = adapted(base), AutoModelForCausalLM.from_pretrained(base).eval()
    plain.save_pretrained(tmp_path)
    before = PreTrainedModel.__dict__["from_pretrained"]
    with lora_fx.reference(model) as ref:
        assert as_trainers_load(model) is ref and AutoModelForCausalLM.from_pretrained(base) is ref
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM  # another folder
        assert type(AutoModel.from_pretrained(base)) is LlamaModel  # another class
        with ThreadPoolExecutor(1) as other:
            assert type(other.submit(as_trainers_load, model).result()) is LlamaForCausalLM
        second = adapted(tmp_path)
        with lora_fx.reference(second) as inner:
            assert as_trainers_load(second) is inner and as_trainers_load(model) is ref
    assert PreTrainedModel.__dict__["from_pretrained"] is before
    assert type(as_trainers_load(model)) is LlamaForCausalLM
    with torch.no_grad():
        model.model.norm.weight.copy_(plain.model.norm.weight)
    assert torch.equal(logits_of(ref), logits(plain))


@pytest.mark.parametrize(
    "options",
    [dict(dtype=torch.float16), dict(dtype="bfloat16"), dict(attn_implementation="eager"), dict(num_labels=3)],
    ids=str,
)
def test_a_block_refuses_another_model_than_its_own(base, options):
    model = adapted(base)
    with pytest.raises(LoraFxError, match=f"{next(iter(options))}=.* asks for another model"), lora_fx.reference(model):
        as_trainers_load(model, **options)
    assert type(as_trainers_load(model, **options)) is LlamaForCausalLM


def test_a_block_that_makes_no_reference_says_so(base):
    with pytest.warns(UserWarning, match="nothing inside the block has loaded"), lora_fx.reference(adapted(base)):
        pass
    with pytest.raises(KeyError), lora_fx.reference(adapted(base)):  # of its own, without the warning
        raise KeyError
    made = lora_fx.apply(LlamaForCausalLM(LlamaConfig(**SIZE)), RULES, {"input_ids": IDS}, check=False)
    with pytest.raises(LoraFxError, match="was not loaded by from_pretrained"), lora_fx.reference(made):
        pass


def test_a_reference_of_no_adapter_and_modules_of_its_own_are_refused(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(LoraFxError, match="its base is the model that trains"):
        lora_fx.reference(plain)(input_ids=IDS)
    with pytest.raises(LoraFxError, match="no modules and parameters of its own"):  # TRL's cast_lm_head_to_fp32
        lora_fx.reference(adapted(base)).lm_head = plain.lm_head


def test_adapters_that_are_named_act_in_the_reference(base):
    model = adapted(base, name="sft")
    before = logits(model)
    known = {key: t.clone() for key, t in lora_fx.reference(model, "sft").state_dict().items()}
    lora_fx.apply(model, RULES, {"input_ids": IDS}, name="dpo", check=False)
    reference.fill(model, seed=5)
    with torch.no_grad():
        for key, value in known.items():
            model.state_dict()[key].copy_(value)
    ref = lora_fx.reference(model, "sft")
    assert not torch.equal(logits(model), before) and ref.state_dict().keys() == known.keys()
    assert torch.equal(logits_of(ref), before)
    with pytest.raises(AdapterError, match="there is no adapter 'other'"):
        lora_fx.reference(model, "other")


@torch.no_grad()
def logits_of(model):
    torch.manual_seed(3)
    return model(input_ids=IDS).logits


def test_trl_is_refused_an_adapted_head(base):
    model = adapted(base, [Rule(where="lm_head", rank=2)])
    asked = {"__name__": "trl.trainer.utils", "model": model}
    with pytest.raises(LoraFxError, match=r"trl.trainer.utils multiplies with its weight past the head's forward"):
        eval("model.get_output_embeddings()", asked)
    assert model.get_output_embeddings() is model.lm_head
    lora_fx.remove(model, "default")
    assert eval("model.get_output_embeddings()", asked) is model.lm_head


# ── for other readers ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_baked_scales_leave_one_rank_and_the_scale_one(base, tmp_path, scaling):
    rules = [
        Rule(where="*.q_proj", rank=2, alpha=8, scaling=scaling),
        Rule(where="*.mlp.*", rank=4, alpha=2, kind="dora" if scaling == "rslora" else None, scaling=scaling),
        Rule(where="*.v_proj", rank=1, alpha=0.3, scaling=scaling),
    ][: 3 if scaling == "standard" else 1]
    model = adapted(base, rules)
    lora_fx.save_adapter(model, tmp_path, bake_scales=True)
    said = json.loads((tmp_path / CONFIG).read_text())
    rank = max(rule.rank for rule in rules)
    assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (rank, rank, False)
    assert not said["rank_pattern"] and not said["alpha_pattern"]
    assert len(lora_fx.adapters(model)["default"]) == (5 if scaling == "standard" else 1)
    again = lora_fx.from_pretrained(AutoModelForCausalLM, tmp_path, {"input_ids": IDS})
    wanted = {place.weight: place.adapter for place in inventory(model).places}
    for place in inventory(again).places:
        if place.adapter.kind.name == "lora":
            own = wanted[place.weight]
            assert place.adapter.scale == 1
            assert torch.equal(place.adapter.A, own.A)
            assert torch.equal(place.adapter.B, (own.B.double() * own.scale).float())
            if own.scale in (4.0, 0.5):
                assert torch.equal(place.adapter.delta(), own.delta())


def test_baking_is_for_files_of_pefts(base, tmp_path):
    with pytest.raises(FileError, match="bake_scales"):
        lora_fx.save_adapter(adapted(base), tmp_path, peft=False, bake_scales=True)


def test_a_tied_weight_is_said_to_be_merged_wrongly_by_peft(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True))
    lora_fx.apply(model, Rule(where="lm_head", rank=2), {"input_ids": IDS})
    with pytest.warns(
        UserWarning, match=r"embed_tokens.weight = lm_head.weight is one weight.*its merge would be wrong"
    ):
        lora_fx.save_adapter(model, tmp_path)
