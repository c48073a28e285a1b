"""What `lora_fx` has to offer, each name where it is made. The package gives them out at the first look at one."""

from lora_fx.analysis.rules import Rule
from lora_fx.application import (
    activate,
    active,
    adapters,
    apply,
    certify,
    deactivate,
    disabled,
    fold,
    memory,
    pipeline,
    plan,
    remove,
    rename,
    switch,
    unfold,
)
from lora_fx.application.budget import Budget
from lora_fx.application.combination import combine, extract
from lora_fx.application.pretrained import from_pretrained
from lora_fx.application.reference import reference
from lora_fx.application.suggestion import Suggestion, suggest
from lora_fx.application.tokens import with_tokens
from lora_fx.application.trained import Summary, parameter_groups, summary
from lora_fx.checks.certification import Certificate
from lora_fx.checks.footprint import Memory
from lora_fx.checks.verification import Report, verify
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kind_registration import register_kind
from lora_fx.deltas.kinds import Kind
from lora_fx.deltas.nearest import Approximation
from lora_fx.deltas.registration import register_form
from lora_fx.errors import LoraFxError
from lora_fx.export.adapters.configs import PeftRules, rules_from_peft
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.pretrained import adapter_checkpoints
from lora_fx.export.checkpoints.extract import extract_adapter
from lora_fx.export.checkpoints.fold import fold_checkpoint, unfold_checkpoint
from lora_fx.export.checkpoints.manifest import verify_checkpoint
from lora_fx.export.onnx.export import ExportReport, export_onnx
from lora_fx.export.onnx.folding import fold_onnx
from lora_fx.export.onnx.switchable import save_onnx_adapter
from lora_fx.graph.forms import Call, Form
from lora_fx.graph.program import Program, capture
from lora_fx.model.classes import show
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Plan

__all__ = [
    "Adapter",
    "Approximation",
    "Budget",
    "Call",
    "Certificate",
    "ExportReport",
    "Form",
    "Kind",
    "LoraFxError",
    "Memory",
    "PeftRules",
    "Pipeline",
    "Plan",
    "Program",
    "Report",
    "Rule",
    "Suggestion",
    "Summary",
    "activate",
    "active",
    "adapter_checkpoints",
    "adapters",
    "apply",
    "capture",
    "certify",
    "combine",
    "deactivate",
    "disabled",
    "export_onnx",
    "extract",
    "extract_adapter",
    "fold",
    "fold_checkpoint",
    "fold_onnx",
    "from_pretrained",
    "load_adapter",
    "memory",
    "parameter_groups",
    "pipeline",
    "plan",
    "reference",
    "register_form",
    "register_kind",
    "remove",
    "rename",
    "rules_from_peft",
    "save_adapter",
    "save_onnx_adapter",
    "show",
    "suggest",
    "summary",
    "switch",
    "unfold",
    "unfold_checkpoint",
    "verify",
    "verify_checkpoint",
    "with_tokens",
]
