"""Exported files in the runtimes that people deploy to, held against torch: greedy tokens and switchable outputs.

    python -m tests.runtimes [--models NAME …] [--genai PYTHON] [--optimum PYTHON] [--modules FOLDER] [--browser FILE]

It installs nothing: what is missing is named in its table, and what is there is run. `PYTHON` is that of an environment
with onnxruntime-genai, or with optimum-onnx and the transformers it wants; `FOLDER` has node_modules with
onnxruntime-node, onnxruntime-web and @huggingface/transformers. Variables of the environment stand for the options:
LORA_FX_GENAI, LORA_FX_OPTIMUM, LORA_FX_MODULES, LORA_FX_BROWSER.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.export import Session
from tests import reference

HERE = Path(__file__).parent
WEB = HERE.parent.parent / "examples" / "web"

PAD = 0
PROMPTS = ([*range(3, 15)], [*range(40, 47)])
"""Of two lengths: the shorter one is padded."""
TOKENS = 16
ADAPTERS = ("one", "two")
INPUTS = {"input_ids": torch.tensor(PROMPTS[:1])}

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
_PLAIN = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **_SPECIAL,
}  # fmt: skip
_GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **_SPECIAL}

#: architecture → the name of its classes in transformers, and its configuration
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", _PLAIN),
    "mistral": ("Mistral", {**_PLAIN, "sliding_window": 8}),
    "qwen2": ("Qwen2", _PLAIN),
    "qwen3": ("Qwen3", {**_PLAIN, "head_dim": 8}),
    "gemma": ("Gemma", {**_PLAIN, "head_dim": 8}),
    "phi3": ("Phi3", _PLAIN),
    "olmo2": ("Olmo2", _PLAIN),
    "gpt_neox": ("GPTNeoX", _PLAIN),
    "opt": ("OPT", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def build(name: str, adapters: Sequence[str] = ADAPTERS, where: str = "*", **other: Any) -> nn.Module:
    """A language model of random weights with adapters that change what it says. The first one is active."""
    import transformers

    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, **other})
    generator = torch.Generator().manual_seed(len(name))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = getattr(transformers, _HEADS.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # of weights as small as at a start, one token follows on every other
    for adapter in adapters:
        lora_fx.apply(model, Rule(where=where, rank=4, alpha=8), INPUTS, name=adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return lora_fx.activate(model, *adapters[:1]) if adapters else model


def greedy(model: nn.Module, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """What torch says after each prompt."""
    ids = _padded(prompts)
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=TOKENS, do_sample=False
        )
    return found[:, ids.shape[1] :].tolist()


def _padded(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, prompts))
    return torch.tensor([[PAD] * (longest - len(prompt)) + [*prompt] for prompt in prompts])


def in_session(session: Session, adapter: str | None = None) -> list[list[int]]:
    """The same in ONNX Runtime, step by step on the cache; every prompt has its whole length: no token ends one."""
    ids = _padded(PROMPTS)
    mask, given = (ids != PAD).long(), {value.name: value for value in session.session.get_inputs()}
    caches = [name for name in session.inputs if name.startswith("past_key_values")]
    fed = {n: torch.zeros(len(ids), given[n].shape[1], 0, given[n].shape[3]) for n in caches}
    said = []
    for _ in range(TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        fed |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = session.run({name: fed[name] for name in session.inputs}, adapter)
        ids = found["logits"][:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], -1)
        fed = {name: found[name.replace("past_key_values", "present")] for name in caches}
        said.append(ids)
    return torch.cat(said, -1).tolist()


def ended(said: Sequence[Sequence[int]]) -> list[list[int]]:
    """Without the end, and what a runtime says behind it: some say it, some pad, some stop."""
    end = _SPECIAL["eos_token_id"]
    return [[*row[: row.index(end)]] if end in row else [*row] for row in said]


# ── runtimes in processes of their own ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Places:
    """Where the runtimes are; None for those that are not here."""

    genai: str | None
    optimum: str | None
    modules: Path | None
    browser: str | None

    @classmethod
    def found(cls, **given: str | None) -> Places:
        """As given, as the environment says, or where they may be."""

        def at(name: str, here: str | None) -> str | None:
            return given.get(name) or os.environ.get(f"LORA_FX_{name.upper()}") or here

        modules = at("modules", str(WEB) if (WEB / "node_modules").is_dir() else None)
        browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        return cls(
            at("genai", sys.executable if importlib.util.find_spec("onnxruntime_genai") else None),
            at("optimum", sys.executable if importlib.util.find_spec("optimum") else None),
            Path(modules).absolute() if modules and shutil.which("node") else None,
            at("browser", next(filter(None, browsers), None)),
        )


def answer(*command: object) -> dict[str, Any]:
    """What a runtime's script prints in its last line."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-800:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def genai(python: str, folder: Path, files: Mapping[str, Path], sliding: bool) -> dict[str, Any]:
    """Padding, which stands behind a prompt there, takes place in a sliding window: those models get one at a time."""
    batches = [[prompt] for prompt in PROMPTS] if sliding else [PROMPTS]
    named = [f"{name}={file}" for name, file in files.items()]
    return answer(python, HERE / "genai.py", folder, json.dumps(batches), TOKENS, *named)


def optimum(python: str, folder: Path) -> dict[str, Any]:
    return answer(python, HERE / "optimum_onnx.py", folder, json.dumps(_padded(PROMPTS).tolist()), TOKENS)


def transformers_js(modules: Path, folder: Path) -> dict[str, Any]:
    prompts = json.dumps(_padded(PROMPTS).tolist())
    return answer("node", HERE / "transformers_js.mjs", modules, folder, prompts, TOKENS)


def in_node(modules: Path, package: str, folder: Path) -> dict[str, Any]:
    return answer("node", folder / "switchable.mjs", modules, package, folder)


def in_browser(modules: Path, browser: str, folder: Path) -> dict[str, Any]:
    """What the page posts: the same cases, with onnxruntime-web in a headless browser."""
    ort = folder / "ort"
    if not ort.exists():
        ort.symlink_to(modules / "node_modules" / "onnxruntime-web" / "dist")
    with _served(folder) as (url, posted):
        profile = folder / "profile"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", f"{url}/page.html"]
        process = subprocess.Popen([browser, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not posted.wait(120):
                raise RuntimeError("the page has posted nothing in two minutes")
        finally:
            process.terminate()
            process.wait()
    found = json.loads(posted.body)
    if "error" in found:
        raise RuntimeError(found["error"])
    return dict(found)


class _Posted(threading.Event):
    body = b""


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, _Posted]]:
    posted = _Posted()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()
            posted.set()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://localhost:{server.server_port}", posted
        finally:
            server.shutdown()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose token n is the word wn, in the folder: what `save_pretrained` of a real one writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(folder)


class Net(nn.Module):
    """An embedding, a convolution, which runs with no rank of 0, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(8, 12), nn.Conv1d(3, 12, 3, padding=1), nn.Linear(12, 10)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.embed(ids) + self.conv(x).mean(-1, keepdim=True).mT)}


FED = {"ids": torch.tensor([[1, 4, 2], [0, 3, 5]]), "x": torch.linspace(-1, 1, 42).reshape(2, 3, 7)}


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = Net().eval()
        for name, rule in zip(ADAPTERS, (Rule(where="embed | head", rank=3), Rule(where="*", rank=2)), strict=True):
            lora_fx.apply(model, rule, FED, name=name)
        reference.fill(model)
    return model


class Switchables:
    """What the cases in JavaScript read, and what torch says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, model = folder, net()
        axes = {name: {0: "batch"} for name in FED}
        options = {"dynamic_shapes": axes, "adapters": "switchable"}
        self.report = lora_fx.export_onnx(model, FED, folder / "required.onnx", slots="required", **options)
        for adapter in ADAPTERS:
            lora_fx.save_onnx_adapter(model, folder / f"{adapter}.safetensors", name=adapter)
        lora_fx.save_onnx_adapter(net(1), folder / "foreign.safetensors", name=ADAPTERS[0])
        self.expected = {}
        for adapter in ("", *ADAPTERS):
            lora_fx.activate(model, adapter) if adapter else lora_fx.deactivate(model)
            with torch.no_grad():
                self.expected[adapter] = model(**FED)["logits"]

    def for_javascript(self) -> Path:
        """The folder, with what the cases read beside the files of this."""
        lora_fx.export_onnx(net(), FED, self.folder / "optional.onnx", adapters="switchable", check=False)
        fed = {
            name: {"type": str(t.dtype).removeprefix("torch."), "dims": [*t.shape], "data": t.flatten().tolist()}
            for name, t in FED.items()
        }
        case = {"feeds": fed, "output": "logits", "adapters": ADAPTERS}
        (self.folder / "case.json").write_text(json.dumps(case))
        for script in (WEB / "adapters.mjs", *(HERE / n for n in ("cases.mjs", "switchable.mjs", "page.html"))):
            shutil.copy(script, self.folder)
        return self.folder

    def close(self, adapter: str, output: Mapping[str, Any] | torch.Tensor) -> bool:
        """By the bound that the export measured for this adapter in ONNX Runtime."""
        got = output if isinstance(output, torch.Tensor) else torch.tensor(output["data"]).view(output["dims"])
        wanted = self.expected[adapter]
        reports = [c.reports[0] for c in self.report.comparisons if c.adapter == (adapter or "no adapter")]
        return bool((got - wanted).norm() / wanted.norm() <= max(report.bound for report in reports))

    def wrong(self, found: Mapping[str, Any]) -> list[str]:
        """What a runtime in JavaScript did otherwise than it should."""
        outputs, refusals = found["outputs"], found["refusals"]
        wrong = [f"{name or 'base'} differs" for name, output in outputs.items() if not self.close(name, output)]
        wanted = {"optional": 'slots="required"', "unknown": "add it first", "foreign": "is for base model"}
        wrong += [f"{name}: {refusals[name]!r}" for name, part in wanted.items() if part not in refusals[name]]
        return wrong + ([f"{found['wrong']} damaged files gave other outputs"] if found["wrong"] else [])
