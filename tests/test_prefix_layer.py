"""PreLayer: the ids get from the table, where they are read, to the blocks' outputs: in every way a model is called, or
it is refused by name. What else holds of it is in `test_rewrites`, with the other activation rewrites."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.verification import compare
from lora_fx.errors import EquivalenceError, PlanError
from lora_fx.model import behind
from lora_fx.model.inventory import inventory
from tests.test_rewrites import (
    IDS,
    LAYERS,
    QV,
    TOKENS,
    WIDTH,
    WITH_TOKENS,
    WORDS,
    Block,
    Model,
    adapted,
    assert_bits,
    bits,
    fill,
    model,
    refusal,
)

OTHERS = torch.tensor([[1, 11, 2, 14, 0, 3, 13, 5], [12, 6, 4, 11, 7, 13, 8, 9]])
"""Ids of the same shape, with new tokens elsewhere."""


def by_hand(found: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The paper's definition, on the base: after each block, the trained activations at these positions."""
    theta = found.words.weight_lora_default
    plain = model().to(theta.dtype)
    new = ids >= WORDS
    x = plain.words(torch.where(new, ids % WORDS, ids)) + plain.places(torch.arange(ids.shape[1]))
    for k, block in enumerate(plain.blocks):
        x = block(x)
        trained = getattr(theta, f"block_{k}")
        for row, column in new.nonzero():
            x = x.index_put((row, column), trained[ids[row, column] - WORDS])
    return plain.head(x)


def gradients(found: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, [p for p in found.parameters() if p.requires_grad])


def near(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Of float64."""
    pairs = list(zip(found, wanted, strict=True))
    return all(a.dtype == torch.float64 and bool(compare(a, b, b, 2.0**-50, a.dtype)) for a, b in pairs)


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.fixture
def layers() -> nn.Module:
    return adapted([LAYERS])


class Checkpointed(Model):
    how: object = staticmethod(lambda block, x: block(x))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = self.how(block, x)
        return self.head(x)


def checkpointed(how) -> nn.Module:
    torch.manual_seed(0)
    made = fill(lora_fx.apply(Checkpointed(), [LAYERS], IDS, check=False))
    made.how = how
    return made


# ── what it means ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_after_each_block_the_activations_of_new_tokens_are_the_trained_ones(layers):
    for ids in (WITH_TOKENS, OTHERS, IDS):
        assert torch.equal(layers(ids), by_hand(layers, ids))
    assert torch.equal(layers(IDS), model()(IDS))
    with pytest.raises(IndexError):
        layers(torch.tensor([[1, 15]]))
    with pytest.raises(IndexError):
        layers(torch.tensor([[1, -1]]))


def test_gradients_are_those_of_the_definition(layers):
    layers.double()
    weight = torch.randn(2, 8, WORDS, generator=torch.Generator().manual_seed(3))
    found, wanted = (
        gradients(layers, (call(WITH_TOKENS) * weight).sum()) for call in (layers, partial(by_hand, layers))
    )
    assert all(bool(g.any()) for g in found) and near(found, wanted)


@pytest.mark.parametrize("tokens_first", [True, False])
def test_tokens_beside_it_train_what_the_first_block_gets(tokens_first):
    found = model()
    for name in ("tokens", "layers") if tokens_first else ("layers", "tokens"):
        lora_fx.apply(found, TOKENS if name == "tokens" else LAYERS, IDS, name=name)
    fill(found)
    theta = found.words.weight_lora_tokens.tokens
    seen = []
    found.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    out = found(WITH_TOKENS)
    assert torch.equal(seen[0][:, 2], (theta[2] + found.places.weight[2]).expand(2, -1))
    lora_fx.activate(found, "layers")
    assert not torch.equal(found(WITH_TOKENS), out)
    assert lora_fx.certify(lora_fx.activate(found, "layers", "tokens"), IDS)


def test_the_blocks_that_a_glob_names():
    rule = Rule(
        where="words", role="embedding", kind="prefix_layer", settings={"prefix": 3, "infix": 1, "blocks": "blocks.1"}
    )
    found = fill(lora_fx.apply(model(), rule, IDS))
    assert sum(p.numel() for p in found.parameters() if p.requires_grad) == 4 * WIDTH
    assert [behind.behind(block) != () for block in found.blocks] == [False, True]
    assert "# behind it block_0 of default" in lora_fx.show(found.blocks[1])
    kept = []
    found.blocks[1].register_forward_hook(lambda block, args, output: kept.append(output))
    found(WITH_TOKENS)
    assert torch.equal(kept[0][0, 0], found.words.weight_lora_default.block_0[0])  # hooks see what comes out


# ── how models are called ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_runs_a_block_again_with_the_ids_of_its_own_call(reentrant):
    weight = torch.randn(2, 8, WORDS, generator=torch.Generator().manual_seed(3))
    each = []
    for how in (Checkpointed.how, partial(checkpoint, use_reentrant=reentrant)):
        found = checkpointed(how)
        found.places.weight.requires_grad_(True)  # a reentrant one wants an input that trains
        first, second, third, fourth = ((found(ids) * weight).sum() for ids in (WITH_TOKENS, OTHERS) * 2)
        grads = []
        for loss in (first, second, third + fourth):  # backwards that begin when all forwards are through
            found.zero_grad()
            loss.backward()
            grads += [p.grad for p in found.parameters() if p.requires_grad]
        each.append(grads)
    assert same(*each)


def test_a_checkpoint_of_several_blocks_and_of_the_whole():
    weight = torch.randn(2, 8, WORDS, generator=torch.Generator().manual_seed(3))
    plain, found = adapted([LAYERS]), adapted([LAYERS])
    wanted = gradients(plain, (plain(WITH_TOKENS) * weight).sum())
    whole = checkpoint(found, WITH_TOKENS, use_reentrant=False)
    found(OTHERS)  # the last call is another one
    assert same(gradients(found, (whole * weight).sum()), wanted)

    class Pairs(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            return self.head(checkpoint_sequential(self.blocks, 2, x, use_reentrant=False))

    torch.manual_seed(0)
    pairs = fill(lora_fx.apply(Pairs(), [LAYERS], IDS, check=False))
    pairs.blocks.__class__ = nn.Sequential
    loss = (pairs(WITH_TOKENS) * weight).sum()
    pairs(OTHERS)
    assert same(gradients(pairs, loss), wanted)


def test_a_checkpoint_that_changes_the_input_of_a_block_is_refused():
    found = checkpointed(lambda block, x: checkpoint(lambda y: block(y * 1.5), x, use_reentrant=False))
    loss = found(WITH_TOKENS).sum()
    assert "a block runs outside of a call" in refusal(LoraFxError, loss.backward)


def test_a_call_inside_of_a_call_and_one_that_fails_leave_the_outer_one_its_ids(layers):
    wanted, inner = layers(WITH_TOKENS), layers(OTHERS)
    kept = []

    def nested(block: nn.Module, args: object) -> None:
        handle.remove()
        kept.append(layers(OTHERS))
        with pytest.raises(IndexError):
            layers(torch.tensor([[99, 1]]))

    handle = layers.blocks[1].register_forward_pre_hook(nested)
    assert torch.equal(layers(WITH_TOKENS), wanted) and torch.equal(kept[0], inner)
    with pytest.raises(IndexError):
        layers(torch.tensor([[99, 1]]))
    assert "outside of a call" in refusal(LoraFxError, layers.blocks[0], torch.randn(1, 2, WIDTH))
    assert torch.equal(layers(WITH_TOKENS), wanted)


def test_two_models_in_each_other_and_threads_have_ids_of_their_own():
    first, second, inner = adapted([LAYERS]), adapted([LAYERS]), []
    wanted = {id(ids): first(ids) for ids in (WITH_TOKENS, OTHERS, IDS)}
    first.blocks[0].register_forward_hook(lambda *_: inner.append(second(OTHERS)))
    assert torch.equal(first(WITH_TOKENS), wanted[id(WITH_TOKENS)])
    assert torch.equal(inner[0], wanted[id(OTHERS)])
    wrong, start = [], threading.Barrier(3)

    def serve(ids: torch.Tensor) -> None:
        start.wait()
        wrong.extend(None for _ in range(30) if not torch.equal(second(ids), wanted[id(ids)]))

    threads = [threading.Thread(target=serve, args=(ids,)) for ids in (WITH_TOKENS, OTHERS, IDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ids_looked_up_outside_of_a_call_are_refused_where_some_are_new(layers):
    assert layers.words(IDS).shape == (2, 4, WIDTH)
    assert "outside of a call of the model" in refusal(LoraFxError, layers.words, WITH_TOKENS)


def test_without_ids_there_are_no_new_tokens():
    class Either(Model):
        def forward(self, ids: torch.Tensor | None = None, embedded: torch.Tensor | None = None) -> torch.Tensor:
            x = (self.words(ids) if embedded is None else embedded) + self.places(torch.arange(4))
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    found = fill(lora_fx.apply(Either(), [LAYERS], IDS))
    assert torch.equal(found(embedded=found.words(IDS)), found(IDS))


def test_copies_pickles_and_parts(layers):
    wanted = layers(WITH_TOKENS)
    for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        with torch.no_grad():
            assert torch.equal(copied(WITH_TOKENS), wanted)
            copied.words.weight_lora_default.block_1.add_(1)
        assert not torch.equal(copied(WITH_TOKENS), wanted)
    assert torch.equal(layers(WITH_TOKENS), wanted)
    alone = copy.deepcopy(layers.blocks[0])
    assert "outside of a call" in refusal(LoraFxError, alone, torch.randn(1, 2, WIDTH))
    layers.blocks[1] = Block()
    before = bits(layers)
    assert "1 of the 2 blocks" in refusal(LoraFxError, lora_fx.activate, layers, "default")
    assert_bits(layers, before)


def test_removed_and_refused_it_leaves_nothing(layers):
    lora_fx.remove(layers, "default")
    refused = model()
    rules = [LAYERS, Rule(where="blocks.0.q", rank=99)]
    refusal(PlanError, lora_fx.apply, refused, rules, IDS)
    for found in (layers, refused):
        plain = model()
        for path, module in plain.named_modules():
            own = found.get_submodule(path)
            assert type(own) is type(module) and own.__dict__.keys() == module.__dict__.keys(), path
        assert_bits(found, bits(plain))


def test_an_apply_that_its_check_refuses_leaves_nothing(monkeypatch):
    monkeypatch.setattr(behind.Behind, "of", lambda self, block, given, output: output)
    found = model()
    assert "(behind it block_0 in blocks.0)" in refusal(EquivalenceError, lora_fx.apply, found, [LAYERS, QV], IDS)
    for path, module in model().named_modules():
        own = found.get_submodule(path)
        assert type(own) is type(module) and own.__dict__.keys() == module.__dict__.keys(), path


def test_saved_from_inside_of_another_model(layers, tmp_path):
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids)

    lora_fx.save_adapter(Outer(layers), tmp_path, peft=False)
    loaded = lora_fx.load_adapter(Outer(model()), tmp_path, IDS)
    assert torch.equal(loaded(WITH_TOKENS), layers(WITH_TOKENS))
    layers.blocks[1] = Block()
    assert "the block that block_1 stands behind" in refusal(
        LoraFxError, lora_fx.save_adapter, layers, tmp_path, peft=False
    )


def _llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=20, bos_token_id=1, eos_token_id=None, pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config).double().eval()


def test_generation_with_a_cache_and_gradient_checkpointing_of_transformers():
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]]), "attention_mask": torch.ones(2, 4).long()}
    rule = Rule(role="embedding", kind="prefix_layer", settings={"prefix": 2, "infix": 1})
    found = fill(lora_fx.apply(_llama(), [rule], batch))
    assert [name for name, m in found.named_modules() if behind.callers(m)] == ["model"]
    longer = lora_fx.with_tokens(batch, 2, 1, vocabulary=20)
    options = {"max_new_tokens": 4, "do_sample": False}
    cached, plain = (found.generate(**longer, **options, use_cache=own) for own in (True, False))
    assert torch.equal(cached, plain) and not torch.equal(plain[:, 7:], _llama().generate(**batch, **options)[:, 4:])
    each = []
    for reentrant in (None, False, True):
        found.train()
        if reentrant is not None:
            found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            found.enable_input_require_grads()
        loss = found(**longer, labels=longer["input_ids"] % 20).loss
        found(**lora_fx.with_tokens(batch, 2, 1, vocabulary=20, at=1))
        found.zero_grad()
        loss.backward()
        each.append([p.grad for p in found.parameters() if p.requires_grad])
    assert near(each[1], each[0]) and near(each[2], each[0]) and all(bool(g.any()) for g in each[0])


PAIRS = {
    "input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 2, 1, 3]]),
    "decoder_input_ids": torch.tensor([[0, 4, 5], [0, 8, 1]]),
}
LONGER = {name: lora_fx.with_tokens(ids, 2, 1, vocabulary=20, at=1) for name, ids in PAIRS.items()}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def _t5() -> nn.Module:
    """An encoder-decoder, both stacks with one table."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False}
    return (
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=20, **sizes, **ends)).double().eval()
    )


def same_generation(found: nn.Module, wanted: nn.Module, batch: dict) -> bool:
    """Tokens and logits, which transformers rounds to float32, each with a cache and without one."""
    runs = [
        model.generate(**batch, **GREEDY, use_cache=cached) for model in (found, wanted) for cached in (True, False)
    ]
    logits, right = [torch.stack(run.logits) for run in runs], runs[-1].sequences
    close = all(bool(compare(own, logits[-1], logits[-1], 2.0**-24, own.dtype)) for own in logits)
    return close and all(torch.equal(run.sequences, right) for run in runs)


def test_tokens_of_an_encoder_decoder_are_generated_from():
    rule = Rule(where="shared*", role="embedding", kind="tokens", settings={"prefix": 2, "infix": 1})
    found, plain = fill(lora_fx.apply(_t5(), rule, PAIRS)), _t5()
    theta = inventory(found).adapters[0].tokens.detach()
    plain.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat([plain.shared.weight.detach(), theta])))
    assert same_generation(found, plain, LONGER)
    assert same_generation(found, plain, {"input_ids": LONGER["input_ids"]})
    with torch.no_grad():
        inventory(found).adapters[0].tokens.mul_(2)
    assert not same_generation(found, plain, LONGER)


def test_which_stack_is_meant_has_to_be_said():
    rule = Rule(where="shared*", role="embedding", kind="prefix_layer", settings={"prefix": 2})
    said = refusal(PlanError, lora_fx.plan, _t5(), rule, PAIRS)
    assert "settings={'blocks': 'encoder.block.* | decoder.block.*'}, or one of these" in said


@pytest.mark.parametrize("stacks", [("encoder",), ("decoder",), ("encoder", "decoder")], ids="+".join)
def test_each_stack_of_an_encoder_decoder_has_the_ids_of_its_own_calls(stacks, tmp_path):
    blocks = " | ".join(f"{stack}.block.*" for stack in stacks)
    settings = {"prefix": 2, "infix": 1, "blocks": blocks}
    rule = Rule(where="shared*", role="embedding", kind="prefix_layer", settings=settings)
    found, plain = fill(lora_fx.apply(_t5(), rule, PAIRS)), _t5()
    assert [name for name, m in found.named_modules() if behind.callers(m)] == [*stacks]
    certificate = lora_fx.certify(found, PAIRS)
    assert certificate and {row.dtype for row in certificate.rows} == {"float64"}
    assert len(certificate.rows) == 2 + 2 * len(stacks)
    lora_fx.save_adapter(found, tmp_path, peft=False)
    found = lora_fx.load_adapter(_t5(), tmp_path, PAIRS)
    names = {"encoder": "input_ids", "decoder": "decoder_input_ids"}
    batch = PAIRS | {names[stack]: LONGER[names[stack]] for stack in stacks}
    theta, ids = inventory(found).adapters[0], {}

    def read(stack: str, module: nn.Module, args: object, kwargs: dict) -> tuple:
        ids[stack] = kwargs["input_ids"]
        return args, {**kwargs, "input_ids": torch.where(ids[stack] < 20, ids[stack], ids[stack] % 20)}

    def put(stack: str, k: int, module: nn.Module, args: object, output: tuple) -> tuple:
        h = output[0].clone()
        for row, column in (ids[stack] >= 20).nonzero():
            h[row, column] = getattr(theta, f"block_{k}")[ids[stack][row, column] - 20]
        return h, *output[1:]

    for n, stack in enumerate(stacks):
        own = plain.get_submodule(stack)
        own.register_forward_pre_hook(partial(read, stack), with_kwargs=True)
        for k, block in enumerate(own.block):
            block.register_forward_hook(partial(put, stack, 2 * n + k))
    with torch.no_grad():
        assert near([found(**batch).logits], [plain(**batch).logits])
        assert same_generation(found, plain, batch)
        other = {names[stack]: LONGER[names[stack]] for stack in names if stack not in stacks}
        if other:
            assert "outside of a call of the model" in refusal(LoraFxError, found, **(PAIRS | other))


# ── compiled, exported ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
def test_compiled_whole_and_by_blocks(layers):
    layers.double()
    wanted = [layers(ids).detach() for ids in (WITH_TOKENS, OTHERS)]
    weight = torch.randn(2, 8, WORDS, generator=torch.Generator().manual_seed(3))
    gradient = gradients(layers, (layers(OTHERS) * weight).sum())
    whole = torch.compile(layers, backend="aot_eager", fullgraph=True)
    regional = copy.deepcopy(layers)
    for block in regional.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for call, own in ((whole, layers), (regional, regional)):
        assert near([call(ids).detach() for ids in (WITH_TOKENS, OTHERS)], wanted)
        assert near(gradients(own, (call(OTHERS) * weight).sum()), gradient)
    assert inventory(layers).adapters[0].calls.inside is None


def test_exported_it_takes_new_tokens(layers):
    program = torch.export.export(layers.double(), (WITH_TOKENS,)).module()
    each = ([call(ids).detach() for ids in (OTHERS, WITH_TOKENS)] for call in (program, layers))
    assert near(*each)


def test_a_trace_by_fx_is_refused(layers):
    assert "is traced by torch.fx" in refusal(LoraFxError, fx.symbolic_trace, layers)


# ── refused by the plan ──────────────────────────────────────────────────────────────────────────────────────────────


class Odd(nn.Module):
    """Blocks of many kinds, one of which is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.wider = nn.Embedding(WORDS, 6), nn.Linear(6, 8)
        self.narrow, self.after, self.before, self.unseen = (nn.Linear(6, 6) for _ in range(4))
        self.pair, self.dictionary, self.instead = Pair(), Dictionary(), nn.Linear(6, 6)
        self.instead.forward = self.instead.forward
        self.traced = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6)))
        self.first = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        early = self.before(torch.ones(*ids.shape, 6))
        h = self.instead(self.traced(self.pair(self.words(ids))[0]))
        h = self.dictionary(h)["h"] + self.wider(h).sum() + self.narrow(h.flatten(0, 1)).sum() + early
        for block in (*self.first, *self.second):
            h = block(h)
        return self.after(h + self.words(ids.flip(1)))


class Pair(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class Dictionary(Pair):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"h": F.linear(x, self.weight, self.bias)}


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ("nothing.*", "'nothing.*' matches no module"),
        ("wider", "wider gives (2, 4, 8), for ids of (2, 4) and 6 features"),
        ("narrow", "narrow gives (8, 6)"),
        ("before", "before runs before the table is read"),
        ("unseen", "unseen does not run on the example inputs"),
        ("dictionary", "dictionary gives no activations"),
        ("instead", "a forward that is replaced on the instance"),
        ("traced", "traced is a GraphModule"),
        ("words", "no module of the model is a block"),
        (None, "could be meant are traced.*, first.*, second.*"),
    ],
)
def test_what_cannot_be_a_block_is_refused_by_name(blocks, why):
    rule = Rule(where="words", kind="prefix_layer", settings={"prefix": 1, "blocks": blocks})
    assert why in refusal(PlanError, lora_fx.plan, Odd(), rule, IDS)


def test_a_tuple_is_rewritten_at_its_first():
    rule = Rule(where="words", kind="prefix_layer", settings={"prefix": 1, "blocks": "pair | first.* | after"})
    torch.manual_seed(0)
    found = fill(lora_fx.apply(Odd(), rule, IDS, check=False))
    kept = []
    found.pair.register_forward_hook(lambda block, args, output: kept.append(output))
    found(torch.tensor([[1, 11, 2], [3, 4, 5]]))
    assert torch.equal(kept[0][0][0, 1], found.words.weight_lora_default.block_0[0]) and kept[0][1] is None


def test_a_block_that_a_graph_calls_stays_a_call():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, 6)
            self.body = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.body(self.words(ids))

    rule = Rule(where="words", kind="prefix_layer", settings={"prefix": 4, "blocks": "body.0"})
    found = fill(lora_fx.apply(Outer(), [rule, Rule(where="body.*", rank=2)], IDS))
    trained = found.words.weight_lora_default.block_0[WITH_TOKENS[0, :3] - WORDS]
    assert torch.equal(found(WITH_TOKENS)[0, :3], found.body.get_submodule("1")(trained))
    inner = Rule(where="words", kind="prefix_layer", settings={"prefix": 4, "blocks": "body"})
    assert "body is a GraphModule" in refusal(PlanError, lora_fx.plan, Outer(), inner, IDS)
    graph = fx.symbolic_trace(Outer())
    assert "in no call of a module" in refusal(PlanError, lora_fx.plan, graph, rule, IDS)


def test_axes_that_cannot_be_told_apart_are_refused():
    assert "which axis is which cannot be told" in refusal(PlanError, lora_fx.plan, model(), [LAYERS], IDS[:, :2])


def test_two_readings_before_a_block_are_refused():
    class Two(Model):
        twice = True

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids) + (self.words(ids.flip(1)) if self.twice else 0)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    rule = Rule(where="words", kind="prefix_layer", role="embedding", settings={"prefix": 1, "blocks": "blocks.*"})
    assert "behind two readings of the table" in refusal(PlanError, lora_fx.plan, Two(), rule, IDS)
    found = Two()
    found.twice = False
    lora_fx.apply(found, rule, IDS)
    found.twice = True
    assert "read twice before a block ran" in refusal(LoraFxError, found, IDS)


def test_a_block_that_gives_something_else_than_was_planned_is_refused_when_it_runs():
    class Dropping(Block):
        gives = staticmethod(lambda x: x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gives(super().forward(x))

    base = model()
    base.blocks[0] = Dropping()
    found = lora_fx.apply(base, [LAYERS], IDS, check=False)
    for gives, why in (
        (lambda x: x[:, 1:], "gives (2, 3, 8), for ids of (2, 4)"),
        (lambda x: x.transpose(0, 1), "gives (4, 2, 8)"),
        (lambda x: {"h": x}, "gives no activations"),
    ):
        found.blocks[0].gives = gives
        assert why in refusal(LoraFxError, found, IDS)


def test_without_example_inputs_it_is_planned_by_name_and_not_applied():
    rule = Rule(where="words", kind="prefix_layer", settings={"prefix": 3, "infix": 1})
    assert lora_fx.plan(model(), rule).parameters == 2 * 4 * WIDTH
    found = model()
    assert "pass example_inputs" in refusal(PlanError, lora_fx.apply, found, rule)
    assert_bits(found, bits(model()))


# ── ONNX ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unfolded_with_lora_it_runs_in_onnx_runtime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = adapted([LAYERS, QV]).eval()
    assert lora_fx.export_onnx(found, IDS, tmp_path / "m.onnx", adapters="unfolded").comparisons
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for ids in (WITH_TOKENS[:, :4], OTHERS[:, :4], IDS):
        (out,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.no_grad():
            own, wanted = found.float()(ids), found.double()(ids)
        noise = (own - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert compare(torch.from_numpy(out), wanted, wanted, float(noise), torch.float32)
