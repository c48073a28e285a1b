"""`lora-fx plan`, `export`, `certify`: of a model that is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lora_fx.cli.given import MODEL, read_model, read_rules
from lora_fx.cli.lazy import FAILED
from lora_fx.cli.shown import as_json, show

_PLACE = click.Path(path_type=Path)
_rules = click.option("--rule", "rules", multiple=True, metavar="KEY=VALUE,...", help="'role=attention.*,rank=8'.")
_file = click.option("--rules", "file", type=_PLACE, metavar="FILE", help="Instead: TOML, or an adapter_config.json.")


@click.command()
@MODEL
@_rules
@_file
@as_json
def plan(model: str, rules: tuple[str, ...], file: Path | None, as_json: bool) -> None:
    """Show what rules come to on a model: which weights, which roles, how many parameters. Nothing is changed.

    MODEL is a transformers folder, of which only config.json is read; a .pt2 file; or package.module:factory, which
    returns a model, or a model and its inputs.

    \b
    Example:
      lora-fx plan Llama-3.2-1B --rule 'role=attention.query|attention.value,rank=8'
    """
    import lora_fx

    wanted = read_rules(rules, file)
    given = read_model(model, weights=False)
    found = lora_fx.plan(given.model, wanted, given.inputs)
    rows = [_row(row) for row in found.rows]
    said = {"parameters": found.parameters, "of": found.model_parameters, "rows": rows, "notes": list(found.notes)}
    show(found, said, as_json)


def _row(row: Any) -> dict[str, Any]:
    return {
        "weight": row.name, "role": row.role, "kind": row.kind.name, "rank": row.rank,
        "shape": list(row.weight.shape), "parameters": row.parameters, "realised": str(row.realised),
        "names": list(row.weight.names),
    }  # fmt: skip


@click.command()
@MODEL
@click.option("-o", "--out", type=_PLACE, required=True, metavar="FILE", help="The ONNX file.")
@click.option("--adapter", "adapters", type=_PLACE, multiple=True, metavar="FOLDER", help="Folded in as it is written.")
@click.option("--prove", is_flag=True, help="Read the file back, and prove it: the base's graph, the folded numbers.")
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="The weights, after the fold.")
@click.option("--opset", type=click.IntRange(18, 24), default=20, show_default=True)
@as_json
def export(
    model: str, out: Path, adapters: tuple[Path, ...], prove: bool, quantize: str | None, opset: int, as_json: bool
) -> None:
    """Write a model as an ONNX file, with adapters folded in, and compare ONNX Runtime with torch.

    \b
    Example:
      lora-fx export Llama-3.2-1B --adapter task-adapter --prove -o model.onnx
    """
    import lora_fx

    given = read_model(model)
    for k, folder in enumerate(adapters):
        lora_fx.load_adapter(given.model, folder, given.inputs, name=f"adapter_{k + 1}", active=True)
    found = lora_fx.export_onnx(given.model, given.inputs, out, prove=prove, quantize=quantize, opset=opset)
    said = {
        "file": str(found.path), "bytes": found.bytes, "opset": found.opset, "nodes": found.nodes, "form": found.form,
        "operators": dict(found.operators), "adapters": list(found.adapters), "graph": found.graph,
        "largest_difference": found.largest, "proven": found.proof is not None,
    }  # fmt: skip
    show(found, said, as_json)


@click.command()
@MODEL
@click.argument("adapter", type=_PLACE)
@as_json
@click.pass_context
def certify(context: click.Context, model: str, adapter: Path, as_json: bool) -> None:
    """Measure, at every use of every weight that an adapter adapts, that the model computes W + δ there.

    Exit code 3 where it does not.

    \b
    Example:
      lora-fx certify Llama-3.2-1B task-adapter
    """
    import lora_fx

    given = read_model(model)
    lora_fx.load_adapter(given.model, adapter, given.inputs, check=False)
    found = lora_fx.certify(given.model, given.inputs)
    show(found, json.loads(found.to_json()), as_json)
    if not found:
        context.exit(FAILED)
