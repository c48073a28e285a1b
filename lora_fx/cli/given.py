"""A model that is named on the command line, and inputs to run it on.

a folder with config.json           a transformers model
a .pt2 file                         a program that torch.export has saved
package.module:factory              what that returns: a model, or a model and its inputs
"""

from __future__ import annotations

import copy
import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lora_fx.errors import LoraFxError, essence

MODEL = click.argument("model", metavar="MODEL")
"""A folder, a .pt2 file or package.module:factory."""

_NUMBERS = ("rank", "alpha", "dropout", "expect")  # keys of a rule
_WAYS = "pass a transformers folder, a .pt2 file, or package.module:factory"


@dataclass(frozen=True)
class Given:
    """A model, and what it is run on."""

    model: Any
    inputs: Any


def read_model(text: str, weights: bool = True) -> Given:
    """The model of that name.

    Args:
        weights: read its numbers; without them a transformers model is on meta.

    Raises:
        LoraFxError: there is none, or nobody says what it is run on.
    """
    if Path(text).is_dir():
        return _transformers(Path(text), weights)
    if text.endswith(".pt2"):
        return _program(Path(text))
    if ":" in text and not Path(text).exists():
        return _made(text)
    raise LoraFxError(f"{text!r} is no model", place="MODEL", remedy=_WAYS)


def _transformers(folder: Path, weights: bool) -> Given:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise LoraFxError(str(error), place=str(folder), remedy="pip install transformers") from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        named = getattr(transformers, str((config.architectures or ["AutoModel"])[0]), transformers.AutoModel)
        if weights:
            model = named.from_pretrained(folder, dtype="auto")
        else:
            with torch.device("meta"):
                model = (named._from_config if hasattr(named, "_from_config") else named.from_config)(config)
    except Exception as error:  # whatever it meets in files of anyone
        raise LoraFxError(essence(error), place=str(folder), remedy=_WAYS) from error
    return Given(model.eval(), _inputs(model, config))


def _inputs(model: Any, config: Any) -> dict[str, Any]:
    """A sentence, an image or a sound, by the name of what the model reads."""
    import torch

    name = model.main_input_name
    if name == "input_ids":
        ids = torch.arange(2, 10)[None] % config.get_text_config().vocab_size
        inputs = {name: ids}
        return {**inputs, "decoder_input_ids": ids} if config.is_encoder_decoder else inputs
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        return {name: torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))}
    raise LoraFxError(
        f"it reads {name}, and nobody says of which shape",
        place=type(model).__name__,
        remedy="write a factory that returns the model and its inputs, and pass package.module:factory",
    )


def _program(file: Path) -> Given:
    import torch

    from lora_fx.reading import boundary, regular

    regular(file, _WAYS)
    with boundary("it is no program of torch.export", str(file), _WAYS, LoraFxError):
        program = torch.export.load(file)
    if program.example_inputs is None:
        raise LoraFxError("it has no example inputs", place=str(file), remedy="export it with them")
    args, kwargs = program.example_inputs
    return Given(copy.deepcopy(program.module()), tuple(args) if args or not kwargs else kwargs)


def _made(text: str) -> Given:
    from torch import nn

    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LoraFxError(f"it cannot be made: {error}", place=text, remedy=_WAYS) from error
    except Exception as error:
        raise _theirs(error, text) from error
    try:
        made = factory()
    except Exception as error:
        raise _theirs(error, text) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise LoraFxError(f"it returns a {type(model).__name__}, and no module", place=text, remedy=_WAYS)
    return Given(model.eval(), inputs)


def _theirs(error: Exception, text: str) -> LoraFxError:
    """Of a factory, with the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"it cannot be made: {last.filename}:{last.lineno}: {essence(error)}"
    return LoraFxError(reason, place=text, remedy="call it in Python first: it takes no arguments, and returns a model")


def read_rules(texts: Sequence[str], file: Path | None) -> Any:
    """Rules as `lora_fx.plan` takes them.

    Raises:
        LoraFxError: there is none, or one is no list of key=value.
    """
    if file is not None and texts:
        raise LoraFxError("it stands beside --rule", place="--rules", remedy="write all rules in the file, or none")
    if file is not None and file.suffix == ".json":  # PEFT's
        from lora_fx import rules_from_peft

        return rules_from_peft(file)
    if file is not None:
        return file
    rules = []
    for text in texts:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(sign for _, sign, _ in pairs):
            remedy = "write key=value,…: --rule 'role=attention.query|attention.value,rank=8'"
            raise LoraFxError(f"{text!r} is no rule", place="--rule", remedy=remedy)
        rules.append({key.strip(): _value(key.strip(), value.strip()) for key, _, value in pairs})
    if not rules:
        raise LoraFxError("there is no rule", place="--rule", remedy="give one: --rule 'role=attention.*,rank=8'")
    return rules


def _value(key: str, text: str) -> Any:
    """A number where the key has one; ``a|b`` as rules write it."""
    for kind in (int, float) if key in _NUMBERS else ():
        try:
            return kind(text)
        except ValueError:
            continue
    return " | ".join(part.strip() for part in text.split("|"))
