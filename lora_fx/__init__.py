"""LoRA as a graph-rewriting compiler pass:   y = x·Wᵀ   ⇄   y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ"""

from lora_fx.adapter import Adapter
from lora_fx.application import activate, adapters, apply, certify, deactivate, remove, switch
from lora_fx.certification import Certificate
from lora_fx.errors import LoraFxError
from lora_fx.export.adapter_files import load_adapter, save_adapter
from lora_fx.export.onnx_export import ExportReport, export_onnx
from lora_fx.export.onnx_folding import fold_onnx
from lora_fx.export.onnx_switchable import save_onnx_adapter
from lora_fx.passes.fold import fold, unfold
from lora_fx.planning import Plan, plan
from lora_fx.program import Program, capture
from lora_fx.rules import Rule
from lora_fx.verification import Report, verify
from lora_fx.wiring import show

__all__ = [
    "Adapter",
    "Certificate",
    "ExportReport",
    "LoraFxError",
    "Plan",
    "Program",
    "Report",
    "Rule",
    "activate",
    "adapters",
    "apply",
    "capture",
    "certify",
    "deactivate",
    "export_onnx",
    "fold",
    "fold_onnx",
    "load_adapter",
    "plan",
    "remove",
    "save_adapter",
    "save_onnx_adapter",
    "show",
    "switch",
    "unfold",
    "verify",
]
