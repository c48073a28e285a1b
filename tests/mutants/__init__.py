"""Deliberate defects of the library, a row each: the tests must turn red on every one of them.

A row names a defect, the file, a text that occurs in it exactly once, what stands there instead, and the defect in a
sentence. Nothing on disk is ever changed: `tests.mutants.hook` replaces the text while the module is imported.

    python -m tests.mutants                      all of them, and which law or test caught which
    python -m tests.mutants unfold_off_by_one    one
    LORA_FX_MUTANT=unfold_off_by_one python -m pytest -p tests.mutants.plugin -n 0 tests/test_fold.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Area:
    """What is run against the mutants of one part of the library, beside the laws over random models."""

    tests: tuple[str, ...]
    """pytest's arguments: files, or single tests of slow files."""
    zoo: str = ""
    """The architectures of the zoo whose laws (tests/test_laws.py) are run, joined by commas."""
    laws: str = ""
    """The laws that are run over random models (tests/test_random_laws.py), joined by commas."""


@dataclass(frozen=True)
class Mutant:
    """One defect."""

    name: str
    area: str
    file: str
    """Relative to the repository."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    what: str
    """The defect, in a sentence."""
    tests: tuple[str, ...] = ()
    """Instead of the area's."""
    zoo: str = ""
    """Instead of the area's."""
    laws: str = ""
    """Instead of the area's."""

    @property
    def module(self) -> str:
        """The name it is imported under."""
        path = self.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        return path if path.startswith("lora_fx") else f"lora_fx.{path}"

    @property
    def suite(self) -> Area:
        area = AREAS[self.area]
        return Area(self.tests or area.tests, self.zoo or area.zoo, self.laws or area.laws)

    def applied(self, source: str) -> str:
        """The source with the defect.

        Raises:
            ValueError: the text to replace does not occur exactly once.
        """
        times = source.count(self.old)
        if times != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {times} times, not once: mend this row")
        return source.replace(self.old, self.new)


def mutant(name: str) -> Mutant:
    """The row of that name."""
    for row in MUTANTS:
        if row.name == name:
            return row
    raise KeyError(f"no mutant {name!r}; there are {', '.join(row.name for row in MUTANTS)}")


GAPS = "tests/test_mutant_gaps.py"
KINDS = "tests/test_kinds.py"


def of_sites(name: str) -> tuple[str, ...]:
    """The row of the table of operands with this name."""
    return (f"tests/test_sites.py::test_every_operand_that_comes_from_parameters_is_a_site[{name}]",)


def of_kinds(*names: str) -> tuple[str, ...]:
    """These tests of `KINDS`, without their ``test_``."""
    return tuple(f"{KINDS}::test_{name}" for name in names)


REWRITES = "tests/test_rewrites.py"


def of_rewrites(name: str) -> tuple[str, ...]:
    """This test of `REWRITES`, without its ``test_``."""
    return (f"{REWRITES}::test_{name}",)


HISTORIES = "tests/test_histories.py"
GRADIENTS = "tests/test_gradients.py"
INTERRUPTS = "tests/test_interrupts.py"
PAPER = "tests/test_paper.py"
MEMORY = "tests/test_memory.py"

CHECKPOINTS = "tests/test_checkpoints.py"
COMMAND = "tests/test_command.py"

AREAS = {
    "algebra": Area((GAPS, "tests/test_forms.py"), "native-chain", "l2"),
    "layouts": Area((GAPS, "tests/test_views.py", "tests/test_forms.py"), "native-conv1d", "l2"),
    "wiring": Area((GAPS, "tests/test_graph_module.py"), "native-two-names", "l2"),
    "settings": Area(("tests/test_settings.py",)),
    "insert": Area((GAPS, "tests/test_refusals.py", "tests/test_rules.py"), "native-tied", "l6"),
    "capture": Area((GAPS, "tests/test_refusals.py"), "native-batchnorm", "l13"),
    "fold": Area(("tests/test_fold.py", "tests/test_rules.py", GAPS), "native-chain", "l3"),
    "rounding": Area(("tests/test_fold.py", GAPS), "native-chain", "l3"),
    "ahead": Area(("tests/test_fold.py",)),
    "unfold": Area(("tests/test_fold.py", "tests/test_rules.py", GAPS), "native-chain", "l5"),
    "changes": Area(("tests/test_concurrency.py",)),
    "switching": Area(("tests/test_switching.py",)),
    "passes": Area(("tests/test_pipeline.py",)),
    "roles": Area(("tests/test_roles.py",)),
    "sites": Area(("tests/test_sites.py", "tests/test_refusals.py")),
    "rules": Area(("tests/test_rules.py", GAPS)),
    "plan": Area(("tests/test_rules.py", "tests/test_refusals.py", GAPS)),
    "verification": Area((GAPS, "tests/test_refusals.py"), "native-tied", "l1"),
    "export": Area(("tests/test_onnx.py",), laws="l10"),
    "schedules": Area(("tests/test_schedules.py",)),
    "dropping": Area(("tests/test_dropping.py",)),
    "dispatch": Area(("tests/test_dispatch.py",)),
    "files": Area(("tests/test_adapter_files.py", GAPS)),
    "kinds": Area((KINDS,)),
    "histories": Area((HISTORIES,)),
    "places": Area(("tests/test_places.py",)),
    "gradients": Area((GRADIENTS,)),
    "paper": Area((PAPER,)),
    "memory": Area((MEMORY,)),
    "rewrites": Area((REWRITES,)),
    "checkpoints": Area((CHECKPOINTS,)),
    "command": Area((COMMAND,)),
}

MUTANTS = (
    # ── the algebra: factors, scale, forms ───────────────────────────────────────────────────────────────────────────
    Mutant(
        "factors_swapped", "algebra", "lora_fx/deltas/adapted_weight.py",
        "        A, B = self._factors(delta, placement)\n        if",
        "        B, A = (factor.mT for factor in self._factors(delta, placement))\n        if",
        "The branch contracts x with B and makes the output with A; only square weights take it.",
    ),
    Mutant(
        "scale_dropped", "algebra", "lora_fx/deltas/adapted_weight.py",
        "delta.scaled(z), B)", "z, B)",
        "The branch is x·A·B, without its scale.",
    ),
    Mutant(
        "alpha_for_scale", "algebra", "lora_fx/deltas/kinds.py",
        'return alpha / (math.sqrt(self.rank) if getattr(self, "scaling", "standard") == "rslora" else self.rank)',
        "return alpha",
        "The scale is alpha, in branch and fold alike, so that both agree on the wrong number.",
    ),
    Mutant(
        "rslora_is_standard", "algebra", "lora_fx/deltas/kinds.py",
        '(math.sqrt(self.rank) if getattr(self, "scaling", "standard") == "rslora" else self.rank)', "self.rank",
        "rslora divides alpha by the rank instead of its root.",
    ),
    Mutant(
        "dense_without_scale", "algebra", "lora_fx/deltas/adapted_weight.py",
        "own = branch.delta.of(self.root)", 'own = branch.delta.of(self.root) / getattr(branch.delta, "scale", 1)',
        "Only ops that take the weight whole (LSTM, bilinear) lose the scale.",
        zoo="native-bilinear,native-lstm",
    ),
    Mutant(
        "second_adapter_lost", "algebra", "lora_fx/deltas/adapted_weight.py",
        "for branch, placement in beside:", "for branch, placement in beside[:1]:",
        "Of two adapters on one weight only the first acts.",
        tests=(GAPS,),
    ),
    Mutant(
        "second_scheduled_adapter_lost", "algebra", "lora_fx/deltas/adapted_weight.py",
        "for branch, placement in placed:", "for branch, placement in placed[:1]:",
        "Of two adapters on one matrix only the first acts.",
        tests=(GAPS,),
    ),
    Mutant(
        "scheduled_dropout_missing", "algebra", "lora_fx/deltas/adapted_weight.py",
        "None if drop is None else drop(call.x)", "None",
        "Dropout of the branch never acts in a matmul that is scheduled.",
        tests=(GAPS,),
    ),
    Mutant(
        "stale_input", "algebra", "lora_fx/deltas/adapted_weight.py",
        "        x = call.x\n",
        "        x = call.x\n"
        "        if isinstance(x, fx.Proxy) and getattr(x.node.target, '__name__', '') == 'add':\n"
        "            x = fx.Proxy(x.node.args[0], x.tracer)\n",
        "The branch of the second of two chained matmuls reads what the first one gave before its own branch.",
        tests=(GAPS,),
    ),
    Mutant(
        "dropout_in_eval", "algebra", "lora_fx/deltas/adapted_weight.py",
        "            x = drop(x)", "            x = F.dropout(x, branch.adapter.dropout.p)",
        "Dropout of the branch acts in eval mode too.",
    ),
    Mutant(
        "dropout_missing_in_train", "algebra", "lora_fx/deltas/adapted_weight.py",
        "            x = drop(x)", "            pass",
        "Dropout of the branch never acts: training overfits, and no output in eval mode tells.",
        tests=(GAPS,),
    ),
    Mutant(
        "dropout_missing_on_embeddings", "algebra", "lora_fx/deltas/adapted_weight.py",
        "z = z * drop(torch.ones_like(z[..., :1]))", "pass",
        "Dropout of the branch never acts where the weight is looked up.",
        tests=(GAPS,),
    ),
    Mutant(
        "dropout_on_the_output", "algebra", "lora_fx/deltas/adapted_weight.py",
        "            x = drop(x)", "            x = drop(torch.ones_like(x[..., :1])) * x",
        "Whole tokens are dropped from the branch input instead of single features.",
        tests=(GAPS,),
    ),
    Mutant(
        "rows_shifted", "algebra", "lora_fx/deltas/low_rank.py",
        "F.pad(self.B, (0, 0, self.rows[0], out - self.rows[-1] - 1))",
        "F.pad(self.B, (0, 0, self.rows[0] + 1, out - self.rows[-1] - 2))",
        "A part of a fused weight acts one row further down.",
        zoo="native-chain",
        tests=(GAPS,),
    ),
    Mutant(
        "scattered_rows_in_a_block", "algebra", "lora_fx/deltas/low_rank.py",
        "return zeros.index_copy(len(self.layout.batch), index, self.B)",
        "return F.pad(self.B, (0, 0, self.rows[0], out - self.rows[0] - len(self.rows)))",
        "Rows that are no contiguous range (q, k, v interleaved by head) are taken for one that starts at the first.",
    ),
    Mutant(
        "experts_swap_b", "algebra", "lora_fx/deltas/low_rank.py",
        "self.whole[experts]", "self.whole[experts.flip(0) if experts.ndim else experts]",
        "Experts that are picked by an index tensor get each other's B.",
        zoo="olmoe-batched",
    ),
    Mutant(
        "conv_dilation_ignored", "algebra", "lora_fx/graph/forms.py",
        'o["padding"], o["dilation"], o["groups"])', 'o["padding"], 1, o["groups"])',
        'The branch of a convolution has no dilation; with padding="same" no shape tells.',
        tests=("tests/test_forms.py",),
    ),
    Mutant(
        "conv_groups_interleaved", "algebra", "lora_fx/graph/forms.py",
        'A = A.repeat(o["groups"], *[1] * (len(call.sides) - 1))', 'A = A.repeat_interleave(o["groups"], 0)',
        "Each group of a convolution reads one row of A several times; rank 1 and a single group show nothing.",
        tests=("tests/test_forms.py",),
    ),
    Mutant(
        "conv_transpose_groups_mixed", "algebra", "lora_fx/graph/forms.py",
        "A = A.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)",
        "A = A.unflatten(1, (-1, groups)).permute(2, 0, 1).flatten(0, 1)",
        "The input channels of a grouped transposed convolution go to the wrong groups.",
        zoo="native-deconv",
    ),
    Mutant(
        "addmm_alpha_ignored", "algebra", "lora_fx/graph/forms.py",
        "z if isinstance(alpha, int) and alpha == 1 else z * alpha", "z",
        "addmm(..., alpha=a) multiplies the weight by a, and its branch not.",
        tests=("tests/test_forms.py",),
    ),
    Mutant(
        "wrong_form_registered", "algebra", "lora_fx/deltas/registration.py",
        "            off <= bound,\n", "            True,\n",
        "A form from outside is taken whatever its branch computes.",
        tests=("tests/test_open_forms.py",),
    ),
    Mutant(
        "form_fires_where_it_must_not", "algebra", "lora_fx/deltas/registration.py",
        "self.require(not self.calls, ", "self.require(True, ",
        "A form from outside is taken though it fires on its own counter-example.",
        tests=("tests/test_open_forms.py",),
    ),
    Mutant(
        "form_of_another_library", "algebra", "lora_fx/graph/forms.py",
        'return func._schema.name.removeprefix("aten::")', 'return func._schema.name.rpartition("::")[2]',
        "An op of another library is read as torch's op of the same name.",
        tests=("tests/test_open_forms.py",),
    ),
    Mutant(
        "delta_transposed_where_square", "algebra", "lora_fx/graph/layout.py",
        "return self.to_weight(B @ A)",
        "return self.to_weight((B @ A).mT if self.size('i') == self.size('o') else B @ A)",
        "The dense delta of square weights is transposed; no shape tells.",
        zoo="native-lstm,native-bilinear,native-mha",
    ),
    # ── layouts and views ────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "view_step_ignored", "layouts", "lora_fx/graph/views.py",
        "strides[d] * step\n", "strides[d]\n",
        "Every second row of a weight reads as the rows in front.",
    ),
    Mutant(
        "chunks_rounded_down", "layouts", "lora_fx/graph/views.py",
        "-(-v.shape[v.dim(dim)] // chunks)", "max(v.shape[v.dim(dim)] // chunks, 1)",
        "chunk() of a size that does not divide evenly cuts elsewhere than torch does.",
    ),
    Mutant(
        "select_forgets_the_offset", "layouts", "lora_fx/graph/views.py",
        "offset = self.offset + (index % self.shape[d]) * self.strides[d]",
        "offset = (index % self.shape[d]) * self.strides[d]",
        "W[8:][0] reads as W[0].",
    ),
    Mutant(
        "element_located_by_the_wrong_axis", "layouts", "lora_fx/graph/layout.py",
        "index = own if index is None else index * axis.size + own",
        "index = own if index is None else index + own",
        "The exact sum of a doubtful element takes the factors of another one, where a side has several axes (heads).",
    ),
    # ── tracing and wiring ───────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "tied_owner_not_registered", "insert", "passes/insert.py",
        "for n, (path, attribute) in enumerate(row.owners):", "for n, (path, attribute) in enumerate(row.owners[:1]):",
        "A tied weight is adapted under its first name only; the self-check takes that for a split.",
        tests=("tests/test_laws.py::test_every_name_of_a_tied_weight_is_adapted", "tests/test_rules.py", GAPS),
    ),
    Mutant(
        "use_skipped", "insert", "passes/insert.py",
        "for use in row.weight.uses:", "for use in row.weight.uses[:1]:",
        "A weight that several modules read is rewritten in the first of them.",
        zoo="native-shared-parameter,native-tied",
        tests=(GAPS,),
    ),
    Mutant(
        "site_skipped", "insert", "passes/insert.py",
        "_insert(model, row, plan.name, owners) for row in plan.rows)",
        "_insert(model, row, plan.name, owners) for row in plan.rows[:-1] or plan.rows)",
        "The last site of a plan with several gets no adapter.",
    ),
    Mutant(
        "weights_left_trainable", "insert", "lora_fx/model/training.py",
        "parameter.requires_grad_(False)", "parameter.requires_grad_(parameter.requires_grad)",
        "The base weights train along with the adapters.",
    ),
    Mutant(
        "adapters_not_trainable", "insert", "lora_fx/deltas/adapter.py",
        "nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))",
        "nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)",
        "Nothing trains.",
    ),
    Mutant(
        "factors_in_the_weights_dtype", "insert", "passes/insert.py",
        "dtype=parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32", "dtype=parameter.dtype",
        "The factors of a bfloat16 model are bfloat16: small updates vanish.",
        tests=("tests/test_adapter_files.py::test_dtypes", GAPS),
    ),
    Mutant(
        "adapter_starts_in_eval", "insert", "passes/insert.py",
        "adapter.train(owner.training)", "adapter.eval()",
        "apply on a model in train mode: dropout waits for the next model.train().",
        tests=(GAPS,),
    ),
    Mutant(
        "refusal_leaves_the_weights_frozen", "insert", "lora_fx/changes.py",
        "parameter.requires_grad_(was)", "pass",
        "After a refused apply the base weights do not train any more.",
    ),
    Mutant(
        "refusal_leaves_the_adapters", "insert", "lora_fx/changes.py",
        "for table, was in tables:", "for table, was in ():",
        "After a refused apply the adapters are still there.",
    ),
    Mutant(
        "decisions_baked_in", "wiring", "passes/purity.py",
        "if step.opname not in _INSTRUCTIONS:", "if False:",
        "A forward that tests for None, sets attributes or opens a `with` block is rewritten as what it did once.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "changes_in_place_taken_for_new_values", "wiring", "passes/purity.py",
        'if step.opname == "BINARY_OP" and step.argrepr.endswith("="):', "if False:",
        "`x += 1` in a forward leaves the caller's x as it was.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "closures_set_once", "wiring", "passes/purity.py",
        'if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:', "if False:",
        "A forward that sets a variable of the function around it does so once, in the trace.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "dunders_read_once", "wiring", "passes/purity.py",
        'if name.startswith("__")]', "if not name]",
        "`self.__dict__[...]` in a forward is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "globals_baked_in", "wiring", "passes/purity.py",
        "if not _may_be_named(value, path):", "if False:",
        "Globals, os, random and numpy in a forward are frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "globals_of_any_type", "wiring", "passes/purity.py",
        "        return _is_known(value)\n    if isinstance(value, type):",
        "        return True\n    if isinstance(value, type):",
        "Whatever C function a forward names is taken for one without state: random.random, torch.is_grad_enabled.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "values_above_methods", "wiring", "passes/purity.py",
        "if value is super and (found := _beside_methods(frame)):", "if False:",
        "What `super()` gives in a forward is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "mutable_defaults", "wiring", "passes/purity.py",
        '(not vars(function) or function.__module__.startswith("torch")) and all(map(_is_immutable, defaults))',
        "True",
        "A list as a default of a function is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "mode_baked_in", "wiring", "passes/purity.py",
        'if name == "training":', "if False:",
        "A forward that tests for train mode is rewritten as in the other one.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "containers_baked_in", "wiring", "passes/purity.py",
        "if module is not self.root or not _is_immutable(own[name]):", "if module is not self.root:",
        "Numbers in a dict, a list or a config of the module are frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attributes_of_children_baked_in", "wiring", "passes/purity.py",
        "if module is not self.root or not _is_immutable(own[name]):", "if not _is_immutable(own[name]):",
        "Numbers of a child are frozen: nobody notices when they are set.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "class_attributes_baked_in", "wiring", "passes/purity.py",
        "if module is not self.root or not isinstance(function, types.FunctionType) or not _is_plain(function):",
        "if found is None:",
        "Class attributes and properties are frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "foreign_functions_run_once", "wiring", "passes/purity.py",
        "if code not in _torch_code() and not code.co_filename.startswith((*_OWN, _FX)):", "if False:",
        "What a function of the standard library gave in the trace is frozen.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attributes_not_noticed", "wiring", "passes/purity.py",
        "            self.read.add(name)\n            return own[name]", "            return own[name]",
        "A number of the module's own that is set after apply has no effect.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "methods_not_noticed", "wiring", "passes/purity.py",
        "        self.read.add(name)\n        return object", "        return object",
        "A method that is replaced on the instance after apply has no effect.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "factories_run_once", "wiring", "passes/rewriting.py",
        "if symbolic or not self", "if True or not self",
        "`torch.zeros(…)` and `torch.rand(…)` in a forward are one tensor for all calls.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "unused_calls_dropped", "wiring", "passes/rewriting.py",
        'is_impure_node=lambda n: n.op != "get_attr"', "is_impure_node=lambda n: False",
        "Draws and changes in place whose result nobody reads are left out.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "absent_bias_inlined", "wiring", "passes/rewriting.py",
        "if not (traced.baked or traced.absent):", "if not traced.baked:",
        "A Linear inside a GraphModule that gets a bias after apply goes on without.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attributes_baked_in", "wiring", "lora_fx/model/classes.py",
        'if (name in spec.baked or name == "forward") and', 'if name == "forward" and',
        "Stride, dilation or padding mode of a convolution set after apply have no effect.",
        tests=("tests/test_integration.py::test_an_attribute_changed_after_apply_takes_effect", "tests/test_purity.py"),
    ),
    Mutant(
        "replaced_forward_loses_the_branch", "wiring", "lora_fx/model/classes.py",
        'if (name in spec.baked or name == "forward") and', "if name in spec.baked and",
        "A forward that is set on the module after apply reads the weight without its branch.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "attribute_under_a_derived_class", "wiring", "lora_fx/model/classes.py",
        "        if not is_generated(type(self)):\n            raise", "        if False:\n            raise",
        "An attribute set after another tool derived a class takes that class away.",
        tests=("tests/test_refusals.py::test_an_attribute_of_a_forward_under_a_derived_class",),
    ),
    Mutant(
        "taken_weight_left_out", "wiring", "lora_fx/model/inventory.py",
        "        if attribute not in module._parameters:", "        if attribute is None:",
        "The branch of a weight that is pruned after apply is left out of fold and files.",
        tests=("tests/test_refusals.py::test_a_weight_that_another_tool_has_taken_over",
               "tests/test_refusals.py::test_a_folded_weight_that_another_tool_has_taken_over"),
    ),
    Mutant(
        "derived_class_lost", "wiring", "lora_fx/model/classes.py",
        "spec_of(module) is not None and not is_generated(type(module)):", "False:",
        "Fold and switch take away the class that a parametrization or fully_shard gave an adapted module.",
        tests=("tests/test_refusals.py::test_a_weight_that_another_tool_has_taken_over",),
    ),
    Mutant(
        "classes_confused", "wiring", "lora_fx/model/classes.py",
        "self.reads, self.source, names", "self.reads, names",
        "Modules of one class share one generated forward, whatever scale and dropout stand in it.",
    ),
    Mutant(
        "inactive_adapter_acts", "wiring", "lora_fx/model/inventory.py",
        "if a.active or not active}", "}",
        "A deactivated adapter goes on acting.",
        tests=("tests/test_graph_module.py", "tests/test_fold.py", GAPS),
    ),
    Mutant(
        "deactivated_adapter_trains", "wiring", "lora_fx/deltas/adapter.py",
        "own[name].requires_grad_(whether)", "pass",
        "activate() leaves the adapters trainable that do not act, and frozen the ones that do.",
        tests=(GAPS,),
    ),
    Mutant(
        "kept_class_never_given", "switching", "passes/keeping.py",
        "if one.key == key and self._holds(module, one):", "if False:",
        "Each switch traces every module anew.",
    ),
    Mutant(
        "kept_class_for_others", "switching", "passes/keeping.py",
        "one.key == key and ", "",
        "A module gets the class that reads a weight with an adapter that does not act.",
    ),
    Mutant(
        "kept_class_of_old_values", "switching", "passes/keeping.py",
        "all(_same(self._value(owners[path], name), was) for path, name, was in kept.read)", "True",
        "An attribute that was set while no adapter acted has its old value in the forward.",
    ),
    Mutant(
        "kept_class_of_old_code", "switching", "passes/keeping.py",
        "and _are(_content(code.base), code.content)", "",
        "A method that was replaced while no adapter acted runs on in the forward.",
    ),
    Mutant(
        "kept_classes_of_removed_adapters", "switching", "passes/activate.py",
        "forget_classes(here.modules)", "pass",
        "What was generated for adapters that are gone stays in memory.",
    ),
    Mutant(
        "inlined_keywords_lost", "wiring", "passes/rewriting.py",
        "next(placeholders, kwargs.get(node.target, default))", "next(placeholders, default)",
        "A GraphModule's call of an adapted leaf by keyword gets the default instead.",
        tests=(GAPS,),
    ),
    # ── passes and pipelines ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "requires_unchecked", "passes", "passes/base.py",
        "for condition in self.requires:", "for condition in ():",
        "A pass runs where what it requires does not hold.",
    ),
    Mutant(
        "ensures_unchecked", "passes", "passes/base.py",
        "for condition in self.ensures:", "for condition in ():",
        "A pass that does not do what it promises goes unnoticed.",
    ),
    Mutant(
        "missing_facts_accepted", "passes", "passes/pipeline.py",
        "if c.fact is not None and c.fact not in known]", "if False]",
        "A pipeline without what a pass needs is refused in the middle of its run, not when it is made.",
    ),
    Mutant(
        "two_passes_of_one_name", "passes", "passes/pipeline.py",
        "if one.name in self.names[:k]:", "if False:",
        "Which of two passes people insert before is anyone's guess.",
    ),
    Mutant(
        "after_is_before", "passes", "passes/pipeline.py",
        "self._with(self._place(name) + 1, passes)", "self._with(self._place(name), passes)",
        "A pass inserted after another one runs before it.",
    ),
    Mutant(
        "pipeline_half_done", "passes", "passes/pipeline.py",
        ", changing(model, self.name) as undo, ExitStack() as inside:",
        ", ExitStack() as inside:\n            undo: list = []",
        "A refusal in the middle leaves what the passes before it have done.",
    ),
    Mutant(
        "dump_of_the_start", "passes", "passes/pipeline.py",
        "                    before = after\n", "                    pass\n",
        "The dump shows each pass what all passes before it have changed.",
    ),
    Mutant(
        "removal_without_a_name", "passes", "passes/activate.py",
        "        if not self.names:", "        if False:",
        "remove(model) does nothing, without a word.",
    ),
    Mutant(
        "unknown_adapter_ignored", "passes", "lora_fx/model/inventory.py",
        "            if name not in self.names:", "            if False:",
        "A mistyped adapter is activated, removed and saved in silence.",
    ),
    # ── capture ──────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "capture_leaves_eval_mode", "capture", "lora_fx/graph/own_state.py",
        "self._keep_all([*modules, *buffers_away(model)])", "self._keep_all(p for m in modules for p in m.buffers())",
        "Capturing a model in train mode leaves it in eval mode.",
    ),
    Mutant(
        "capture_moves_buffers", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(value.detach().copy_, value.detach().clone()))", "pass",
        "Running a model to look at it moves its batch statistics.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_draws_random_numbers", "capture", "lora_fx/graph/own_state.py",
        "with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):", "with contextlib.nullcontext():",
        "Looking at a model changes the random numbers drawn after that.",
    ),
    Mutant(
        "capture_fills_logs", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(_restore_list, value, list(value)))", "pass",
        "Looking at a model appends to its lists.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_objects", "capture", "lora_fx/graph/own_state.py",
        "elif package not in _OTHERS:", "elif False:",
        "Looking at a model moves the counters of its meters.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_globals", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(_restore_item, scope, name, value))", "pass",
        "Looking at a model moves the globals that its code counts in.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_class_attributes", "capture", "lora_fx/graph/own_state.py",
        "self.undo.append(partial(_restore_attribute, cls, name, value))", "pass",
        "Looking at a model moves what its class counts.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "capture_moves_pythons_random_state", "capture", "lora_fx/graph/own_state.py",
        "self.undo: list[Undo] = [partial(random.setstate, random.getstate())]", "self.undo: list[Undo] = []",
        "Looking at a model draws from Python's random numbers.",
        tests=("tests/test_purity.py",),
    ),
    Mutant(
        "computed_weight_accepted", "capture", "lora_fx/graph/program.py",
        "        if weight in self.made:", "        if False:",
        "The parameters behind a weight_norm are adapted, which means nothing.",
    ),
    Mutant(
        "unseen_not_told", "capture", "lora_fx/graph/program.py",
        "return tuple(w for w in self.weights if not w.uses)", "return ()",
        "The plan does not say which weights the example inputs never reached.",
        tests=(GAPS,),
    ),
    # ── fold ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fold_transposed", "fold", "lora_fx/deltas/exact_sum.py",
        "layout.to_weight(_in_order(A, B))", "layout.to_weight(_in_order(A, B).mT)",
        "The delta is folded in transposed; a reshape makes it fit.",
    ),
    Mutant(
        "fold_transposed_below_float64", "fold", "lora_fx/deltas/exact_sum.py",
        "(B, A) if sides.endswith(\"oi\") else (A.mT, B.mT)",
        "((B @ A).mT.reshape(B.shape[-2], -1), torch.eye(A.shape[-1]).double())",
        "The same where the weight is narrower than float64, whose delta is a matmul.",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "fold_inputs_first_as_outputs_first", "fold", "lora_fx/deltas/exact_sum.py",
        "else (A.mT, B.mT)", "else ((B @ A).reshape(A.shape[-1], -1), torch.eye(B.shape[-2]).double())",
        "A weight that lies (in, out) takes the delta in the order of one that lies (out, in).",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "fold_without_scale", "fold", "lora_fx/deltas/exact_sum.py",
        "A, B, axes = delta.A, delta.B * delta.scale,", "A, B, axes = delta.A, delta.B,",
        "The fold forgets the scale that the branch has.",
    ),
    Mutant(
        "fold_last_rank_lost", "fold", "lora_fx/deltas/exact_sum.py",
        "for k in range(1, A.shape[-2]):", "for k in range(1, A.shape[-2] - 1):",
        "The last of several components is not folded; rank 1 shows nothing.",
    ),
    Mutant(
        "fold_into_both_uses", "fold", "passes/fold.py",
        "storage.replace(nn.Parameter(sums[k].weight.clone(), storage.parameter.requires_grad))", "pass",
        "An adapter on the head is folded into the tied embedding too.",
        tests=("tests/test_rules.py", GAPS),
    ),
    Mutant(
        "folded_once_for_each_owner", "fold", "lora_fx/model/inventory.py",
        "readers = storages.setdefault(storage_of(parameter), {})",
        "readers = storages.setdefault(id(module), {})",
        "A tied weight is folded as often as it has owners.",
        tests=("tests/test_rules.py", GAPS), zoo="native-tied",
    ),
    Mutant(
        "fold_reads_b_in_half", "fold", "lora_fx/deltas/exact_sum.py",
        "B=delta.whole.clone()", "B=delta.whole.to(torch.bfloat16).to(delta.B.dtype)",
        "B is rounded to bfloat16 on its way into the weight.",
    ),
    Mutant(
        "fold_blocks_forget_heads", "fold", "lora_fx/deltas/exact_sum.py",
        "rows = slice(start * per_row, stop * per_row)", "rows = slice(start, stop)",
        "Where the weight's first axis is one of two on its side (heads), a block takes the factors of other rows.",
        zoo="native-einsum-attention",
        tests=(GAPS,),
    ),
    Mutant(
        "fold_last_block_left_out", "fold", "lora_fx/deltas/exact_sum.py",
        "for start in range(0, rows, step) if", "for start in range(0, max(rows - rows % step, 1), step) if",
        "The last rows of weights above a million elements are not folded.",
        tests=(GAPS,),
    ),
    Mutant(
        "fold_keeps_the_keys", "fold", "passes/fold.py",
        "    for child in record.children:\n        marks.detach(module, child)\n", "",
        "A folded model still has the adapters' keys, and its branches on top of the folded weights.",
    ),
    Mutant(
        "nan_folded", "fold", "lora_fx/deltas/exact_sum.py",
        "if magnitude <= torch", "if not magnitude > torch",
        "Factors with NaN are folded into the weights.",
        tests=("tests/test_refusals.py", GAPS),
    ),
    Mutant(
        "overflow_folded", "fold", "lora_fx/deltas/exact_sum.py",
        "if not all(map(math.isfinite, sums)):", "if False:",
        "A sum beyond float16 is folded as Inf.",
        tests=("tests/test_refusals.py", GAPS),
    ),
    # ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fold_rounds_twice", "rounding", "lora_fx/deltas/exact_sum.py",
        "        flat, values = rounded.view(-1), total.view(-1)\n",
        "        return total.to(self.weight.dtype)\n",
        "Folding converts float64 to bfloat16 as torch does, by way of float32.",
    ),
    Mutant(
        "delta_rounded_before_the_sum", "rounding", "lora_fx/deltas/exact_sum.py",
        "return total.add_(delta), delta", "return total.add_(delta.to(self.weight.dtype)), delta",
        "The delta is rounded to W's dtype, and the sum again.",
    ),
    Mutant(
        "round_once_is_plain_to", "rounding", "lora_fx/deltas/rounding.py",
        "odd = torch.where(inexact, (bits - away.to(torch.int32)) | 1, bits)", "odd = bits",
        "round_once rounds twice.",
    ),
    Mutant(
        "ties_to_odd", "rounding", "lora_fx/deltas/rounding.py",
        "near = round(x / step) * step", "near = (round(x / step - 1) + 1) * step",
        "A sum exactly between two numbers becomes the odd one.",
        tests=(GAPS,),
    ),
    Mutant(
        "doubt_ignored", "rounding", "lora_fx/deltas/exact_sum.py",
        "if len(some):  #", "if False:  #",
        "Sums too near a border for float64 to decide are rounded on a guess.",
    ),
    Mutant(
        "sieve_too_fine", "rounding", "lora_fx/deltas/rounding.py",
        "mul_(2.0**-22)", "mul_(2.0**-26)",
        "What float32 rounds away while doubtful sums are looked for is not allowed for.",
    ),
    # ── looking ahead ────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "gpu_asked_in_each_block", "ahead", "lora_fx/deltas/ahead.py",
        'return device.type != "cpu"', "return False",
        "A fold on a GPU waits for it in each block.",
    ),
    Mutant(
        "look_reads", "ahead", "lora_fx/deltas/ahead.py",
        "    if undoable:\n", "    if undoable or int(counts[0]) < 0:\n",
        "Looking ahead at a block waits for what it has found.",
    ),
    Mutant(
        "other_sums_not_allowed_for", "ahead", "lora_fx/deltas/ahead.py",
        "_TIMES = 4", "_TIMES = 1",
        "A sum that comes out another one the second time may be in doubt then, and nobody has settled it.",
    ),
    Mutant(
        "settled_not_written", "ahead", "lora_fx/deltas/exact_sum.py",
        "            flat[found.places] = found.settled.to(flat.dtype)\n", "            pass\n",
        "What was summed as fractions before the fold is not what is written.",
    ),
    Mutant(
        "doubt_beyond_the_room", "ahead", "lora_fx/deltas/ahead.py",
        "if doubtful > self.room or open_ > len(self.places):", "if False:",
        "Of a block with much in doubt the first few elements are looked at.",
    ),
    Mutant(
        "block_not_halved", "ahead", "lora_fx/deltas/ahead.py",
        "if smaller == sizes:", "if True:",
        "A fold whose first blocks find no memory is refused.",
    ),
    Mutant(
        "way_back_in_other_blocks", "ahead", "lora_fx/deltas/exact_sum.py",
        "zip(whole.blocks(self.elements), self.remainders, strict=True)",
        "zip(whole.blocks(_BLOCK), self.remainders, strict=True)",
        "Unfolding takes blocks of today's size, and not the fold's.",
    ),
    Mutant(
        "block_of_all_memory", "ahead", "lora_fx/deltas/exact_sum.py",
        "free // (2 * scratches", "free // (scratches",
        "A block on a GPU takes all the memory that is free, and nothing is left to compute with.",
    ),
    # ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "fused_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "add(_part(rows, first, B), z.mT, B.mT, alpha=scale)", "add(_part(rows, first, B), z.mT, B.mT)",
        "The branch that is accumulated in place is x·A·B, without its scale.",
        laws="l2",
    ),
    Mutant(
        "fused_part_at_the_front", "schedules", "lora_fx/deltas/kernels.py",
        "rows.narrow(-1, first, B.size(-2))", "rows.narrow(-1, 0, B.size(-2))",
        "An adapter of the value rows of a fused weight acts on its first rows.",
    ),
    Mutant(
        "dense_schedule_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "            total = add(total, left, right, alpha=scale)", "            total = add(total, left, right)",
        "W + B·A, without its scale, where the tokens are many.",
    ),
    Mutant(
        "dense_part_at_the_front", "schedules", "lora_fx/deltas/kernels.py",
        "total.tensor_split((first, first + B.shape[-2]), dim=axis)", "total.tensor_split((0, B.shape[-2]), dim=axis)",
        "Where the tokens are many, an adapter of the value rows of a fused weight acts on its first rows.",
    ),
    Mutant(
        "dense_drops_the_whole_input", "schedules", "lora_fx/deltas/schedules.py",
        "dense = dense and (dropped is None or dropped is x)", "dense = dense",
        "Where the tokens are many, dropout on the branch is forgotten.",
    ),
    Mutant(
        "gradient_of_a_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "grad_a = scaled(A, z, own, beta=0, alpha=scale)", "grad_a = scaled(A, z, own, beta=0)",
        "A learns at another rate than B.",
    ),
    Mutant(
        "gradient_of_x_without_branch", "schedules", "lora_fx/deltas/kernels.py",
        "add(grad_x, z.mT, A, alpha=scale)", "pass",
        "What flows back to earlier layers misses the branch's share.",
    ),
    Mutant(
        "product_of_the_wrong_operands", "schedules", "lora_fx/deltas/rematerialization.py",
        "return lambda kept: left(kept) * right(kept)", "return lambda kept: left(kept) * left(kept)",
        "In backward, the input of a site is made again from one of its two operands.",
        tests=("tests/test_rematerialization.py",),
    ),
    Mutant(
        "product_shared_for_ever", "schedules", "lora_fx/deltas/rematerialization.py",
        "        if shared.left == 0:\n            shared.value = None\n", "",
        "What is made again in backward is never let go.",
        tests=("tests/test_rematerialization.py",),
    ),
    Mutant(
        "compiled_without_dropout", "schedules", "lora_fx/deltas/compiled_schedules.py",
        "dropped or [None] * len(scales)", "[None] * len(scales)",
        "The op that a compiled model runs takes x, where dropout has made another input of it.",
    ),
    Mutant(
        "exported_with_an_op_of_ours", "schedules", "lora_fx/deltas/compiled_schedules.py",
        "        or torch.compiler.is_exporting()\n", "",
        "An exported program cannot be read without lora_fx.",
    ),
    Mutant(
        "second_order_through_constants", "schedules", "lora_fx/deltas/schedules.py",
        "        if torch.is_grad_enabled():\n            return _diff", "        if False:\n            return _diff",
        "Second derivatives take x·Aᵀ for a constant.",
    ),
    Mutant(
        "schedule_in_place_under_vmap", "schedules", "lora_fx/deltas/schedules.py",
        "        or _transforms()\n        or _traces()\n", "",
        "Accumulating in place meets a transformed call.",
    ),
    Mutant(
        "output_is_a_view", "schedules", "lora_fx/deltas/kernels.py",
        "return _unsafe_view(y, y.shape) if y._is_view() else y", "return y",
        "What comes after a matmul must not write into what it gets.",
    ),
    Mutant(
        "in_place_without_scale", "schedules", "lora_fx/deltas/kernels.py",
        "addmm_(z, B.t(), alpha=scale)", "addmm_(z, B.t())",
        "A small call computes x·A·B, without its scale.",
    ),
    Mutant(
        "in_place_part_at_the_front", "schedules", "lora_fx/deltas/kernels.py",
        "_part(y, first, B).addmm_", "_part(y, 0, B).addmm_",
        "In a small call an adapter of the value rows of a fused weight acts on its first rows.",
    ),
    Mutant(
        "stale_factors", "schedules", "lora_fx/deltas/kernels.py",
        "def cast(", "@__import__('functools').lru_cache\ndef cast(",
        "Factors cast for one call are taken for the next, whatever was written to them since.",
        tests=("tests/test_schedules.py::test_factors_written_to_behind_their_version_counters_act_in_the_next_call",),
    ),
    Mutant(
        "sum_lies_otherwise", "schedules", "lora_fx/deltas/schedules.py",
        " and weight.is_contiguous()", "",
        "A fresh adapter changes the last bits where W does not lie in order.",
    ),
    Mutant(
        "in_place_under_a_mode", "schedules", "lora_fx/deltas/schedules.py",
        "        or _modes()", "        or False",
        "Selective checkpointing finds that what it kept has been written to.",
    ),
    # ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "kept_without_scale", "dropping", "lora_fx/deltas/dropping.py",
        ".mul_(2**_BITS / (2**_BITS - dropped))", "",
        "Dropout makes the branch smaller in training than it is afterwards.",
    ),
    Mutant(
        "drops_what_it_should_keep", "dropping", "lora_fx/deltas/dropping.py",
        "dropped - 2 ** (_BITS - 1)", "2 ** (_BITS - 1) - dropped",
        "1 − p of the elements are dropped.",
    ),
    Mutant(
        "a_bit_that_is_never_drawn", "dropping", "lora_fx/deltas/dropping.py",
        "random_(-(2**63), None)", "random_()",
        "Every fourth element is dropped less often.",
    ),
    Mutant(
        "captured_with_draws_of_ours", "dropping", "lora_fx/deltas/dropping.py",
        "return not captured and ", "return ",
        "A program that is captured shows how dropout is drawn, instead of dropout.",
    ),
    Mutant(
        "first_adapter_for_all", "dropping", "lora_fx/model/classes.py",
        'return f"{first}{indent}{start}{name}."', 'return f"{first}{indent}{start}{min(held)}."',
        "With two adapters a generated forward reads the factors of one twice.",
    ),
    Mutant(
        "second_adapter_lost_at_once", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "    for adapter in adapters:\n        term", "    for adapter in adapters[:1]:\n        term",
        "Of two adapters on a weight that is read by dispatch only the first acts.",
    ),
    Mutant(
        "view_forgotten_at_once", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "if weight.chain or adapter.layout.sides != sides:", "if adapter.layout.sides != sides:",
        "A slice of a weight is adapted as if it were the whole.",
    ),
    Mutant(
        "bias_of_the_first_call", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "stands = [object() for _ in values]", "stands = [None if v is None else object() for v in values]",
        "Whether a linear adds its bias is what it did when one like it was first called.",
    ),
    Mutant(
        "row_of_the_table_kept", "dispatch", "lora_fx/deltas/adapted_weight.py",
        "if FORMS.get(name) is not form or type(x) not in ORDINARY:", "if type(x) not in ORDINARY:",
        "A form that is taken out of the table goes on deciding.",
    ),
    # ── unfold ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "unfold_off_by_one", "unfold", "lora_fx/deltas/remainder.py",
        ".sub_(_BIAS)", ".sub_(_BIAS - 1)",
        "Every unfolded number is one step of its dtype too large.",
    ),
    Mutant(
        "shaky_guess_trusted", "unfold", "lora_fx/deltas/remainder.py",
        "far.bitwise_or_(torch.bitwise_and(steps, ~15, out=moved))", "torch.bitwise_and(steps, ~15, out=far)",
        "A delta that is summed in another order on the way back can move the guess, and the weight with it.",
        tests=("tests/test_fold.py",),
    ),
    Mutant(
        "unfold_reads_the_factors_of_now", "unfold", "lora_fx/deltas/exact_sum.py",
        "A=delta.A.clone(), B=delta.whole.clone()", "A=delta.A, B=delta.whole",
        "Unfolding takes out what the factors are now, not what was folded in.",
        tests=("tests/test_fold.py::test_training_an_adapter_that_is_put_away_changes_nothing",),
    ),
    Mutant(
        "checksum_always_equal", "unfold", "lora_fx/deltas/rounding.py",
        "return one == other.to(one.device)", "return one == one",
        "A weight that was written to after the fold is unfolded into nonsense.",
        tests=("tests/test_fold.py::test_unfolding_refuses_a_weight_that_was_written_to",),
    ),
    Mutant(
        "unfold_unties", "unfold", "passes/fold.py",
        "update(record.originals)",
        "update({n: nn.Parameter(p.detach().clone()) for n, p in record.originals.items()})",
        "A head that was split from its embedding comes back as a copy.",
        tests=("tests/test_rules.py::test_a_split_use_folds_into_a_copy_of_its_own_and_unfolds_to_one_storage",),
    ),
    Mutant(
        "unfold_writes_before_it_looks", "unfold", "passes/fold.py",
        "        if not right:\n", "        if False:\n",
        "Unfolding does not look whether a weight was written to since.",
    ),
    # ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "query_is_key", "roles", "lora_fx/analysis/dataflow.py",
        "return 1 if dim == -1 else 0", "return 0 if dim == -1 else 1",
        "In attention that is spelled out, query and key change places.",
    ),
    Mutant(
        "key_is_value", "roles", "lora_fx/analysis/roles.py",
        "(core.query, core.key, core.value), strict=True", "(core.query, core.value, core.key), strict=True",
        "Key and value change places.",
    ),
    Mutant(
        "gate_is_up", "roles", "lora_fx/analysis/dataflow.py",
        "gate, up = (a, b) if left.bent else (b, a)", "gate, up = (b, a) if left.bent else (a, b)",
        "The gate of an MLP and the factor beside it change places.",
    ),
    Mutant(
        "fused_part_shifted", "roles", "lora_fx/analysis/roles.py",
        "own = {rows[k] for k in features}", "own = {rows[(k + 1) % len(rows)] for k in features}",
        "The parts of a fused weight are cut one row too low.",
    ),
    Mutant(
        "glu_halves_swapped", "roles", "lora_fx/analysis/dataflow.py",
        "for start in (0, half))", "for start in (half, 0))",
        "The two halves in front of a glu change their roles.",
        tests=("tests/test_roles.py::test_a_fused_weight_is_split_exactly",),
    ),
    # ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "last_rule_decides", "rules", "lora_fx/analysis/rules.py",
        "chosen.update(dict.fromkeys(decided, rule))", "chosen.update(dict.fromkeys(matched, rule))",
        "The last rule that matches a site decides it: exclusions in front are lost.",
        tests=("tests/test_rules.py::test_the_first_rule_that_matches_decides_and_one_without_a_rank_excludes",),
    ),
    Mutant(
        "layers_end_early", "rules", "lora_fx/analysis/rules.py",
        "range(int(m[1]), int(m[2] or m[1]) + 1)", "range(int(m[1]), max(int(m[2] or m[1]), int(m[1]) + 1))",
        "layers='0-3' leaves layer 3 out.",
        tests=("tests/test_rules.py::test_layers_are_ranges_or_integers",),
    ),
    Mutant(
        "expect_ignored", "rules", "lora_fx/analysis/rules.py",
        "if not decided or rule.expect not in (None, len(decided)):", "if not decided:",
        "A rule that decides fewer sites than it expects is no error.",
        tests=("tests/test_rules.py::test_expect_counts_sites",),
    ),
    Mutant(
        "alpha_is_one_by_default", "rules", "lora_fx/deltas/kinds.py",
        "alpha = self.rank if self.alpha is None else self.alpha", "alpha = 1 if self.alpha is None else self.alpha",
        "Without alpha the scale is 1 / rank instead of 1.",
        tests=(GAPS,),
    ),
    Mutant(
        "layer_is_the_last_integer", "rules", "lora_fx/analysis/sites.py",
        r're.search(r"(?:^|\.)(\d+)(?:\.|$)", name)', r're.search(r"(?:^|.*\.)(\d+)(?:\.|$)", name)',
        "layers.1.experts.0 counts as layer 0.",
        tests=(GAPS,),
    ),
    Mutant(
        "names_match_anywhere_in_their_case", "rules", "lora_fx/analysis/rules.py",
        "return any(fnmatchcase(name, glob) for glob in _globs(text))",
        "return any(fnmatchcase(name.lower(), glob.lower()) for glob in _globs(text))",
        "where='W' takes the weight w too.",
        tests=(GAPS,),
    ),
    # ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "parts_merged", "plan", "passes/planning.py",
        "own = (site.rows, site.role) if rule.role is not None and site.rows is not None else None", "own = None",
        "Query and value of a fused weight share one adapter instead of having one each.",
        tests=("tests/test_rules.py::test_a_role_picks_the_rows_of_a_fused_weight_and_a_name_the_whole",),
    ),
    Mutant(
        "other_use_adapted_too", "plan", "passes/planning.py",
        "others = [u for u in weight.uses if u not in uses and _reads_rows(u, rows)]", "others: list[Use] = []",
        "A rule for the head adapts the embedding it is tied to.",
        tests=("tests/test_rules.py::test_a_name_adapts_every_use_of_a_tied_weight_and_a_role_only_its_own",),
    ),
    Mutant(
        "adapted_twice_under_one_name", "plan", "passes/planning.py",
        "same = attribute_of(child) == attribute and adapter.name == name", "same = False",
        "A second apply replaces a trained adapter of the same name.",
        tests=("tests/test_refusals.py",),
    ),
    # ── verification ─────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "self_check_off", "verification", "passes/insert.py",
        "if program.capture is None:", "if program is not None:",
        "apply does not check itself.",
    ),
    Mutant(
        "self_check_in_eval_only", "verification", "lora_fx/checks/certification.py",
        "for training in (False, True)]", "for training in (False,)]",
        "apply does not look at the path that the model takes in train mode.",
        tests=(GAPS,),
    ),
    Mutant(
        "uses_unchecked_in_bfloat16", "verification", "lora_fx/checks/certification.py",
        "        if row.error > row.bound:\n            raise EquivalenceError(",
        "        if False:\n            raise EquivalenceError(",
        "What rounding in bfloat16 hides in the outputs of the whole model is not looked for at its uses.",
        tests=("tests/test_certificate.py::test_apply_sees_a_small_fault_in_bfloat16",),
    ),
    Mutant(
        "weights_that_decide_are_uses", "verification", "lora_fx/checks/certification.py",
        "if captured.transformed or flow.unmeasured or", "if captured.transformed or",
        "What a forward does with a weight beside multiplying is not checked in bfloat16.",
        tests=("tests/test_certificate.py::test_what_no_use_shows_is_checked_with_the_sums",),
    ),
    Mutant(
        "uses_measured_in_their_own_dtype", "verification", "lora_fx/checks/uses.py",
        "            rows = self._judged(reading, *computed())\n", "            raise NotImplementedError\n",
        "The certificate measures a use in the dtype of the model, where rounding could hide its effect.",
        tests=("tests/test_certificate.py::test_what_rounding_in_its_dtype_would_hide_is_measured_in_float64",),
    ),
    Mutant(
        "one_row_is_measured", "verification", "lora_fx/checks/uses.py",
        "        x, y = x[finite], y[finite]\n",
        "        x, y, finite = x[finite][:1], y[finite][:1], finite.nonzero()[:1, 0]\n",
        "The check looks at the first row of x alone, and not at a sum of all of them.",
        tests=("tests/test_certificate.py::test_apply_sees_a_small_fault_in_bfloat16",),
    ),
    Mutant(
        "padding_hides_the_rest", "verification", "lora_fx/checks/uses.py",
        "finite = x.isfinite().all(-1) & y.isfinite().all(-1)", "finite = x.isfinite().all(-1) | True",
        "One NaN in a row of padding makes every sum NaN, which equals any other.",
        tests=("tests/test_certificate.py::test_products_of_rows_are_measured_without_their_weights",),
    ),
    Mutant(
        "self_check_leaves_b", "verification", "lora_fx/checks/verification.py",
        "undo.append(partial(parameter.detach().copy_, parameter.detach().clone()))", "pass",
        "After apply B holds the random numbers of the check.",
    ),
    Mutant(
        "self_check_leaves_the_sum", "verification", "lora_fx/checks/verification.py",
        "undo.append(partial(weight.index_copy_, axis, changed, old))", "pass",
        "After apply the base weights hold the dense sum of the check.",
    ),
    Mutant(
        "bound_too_lax", "verification", "lora_fx/checks/verification.py",
        "SLACK = 16.0", "SLACK = 1e6",
        "An error of a million times the noise passes.",
    ),
    Mutant(
        "nan_is_no_difference", "verification", "lora_fx/checks/verification.py",
        "    if not bool(difference.isfinite().all()):\n        return math.inf",
        "    if not bool(difference.isfinite().all()):\n        return 0.0",
        "A model that gives NaN is equivalent to any other.",
        tests=(GAPS,),
    ),
    Mutant(
        "only_the_first_output", "verification", "lora_fx/checks/verification.py",
        "top = max(reports, key=", "top = max(reports[:1], key=",
        "verify looks at the first output of a model alone.",
        tests=(GAPS,),
    ),
    # ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "exported_without_the_fold", "export", "export/onnx/weights.py",
        "        if not self.adapters:\n", "        if self.dtype:\n",
        "The file holds the base weights.",
        tests=("tests/test_onnx.py::test_float16_is_run",),
    ),
    Mutant(
        "any_file_passes", "export", "export/onnx/runs.py",
        "        if not comparison.equivalent:\n", "        if comparison is None:\n",
        "Whatever ONNX Runtime computes, the file is written.",
        tests=("tests/test_onnx.py::test_a_wrong_weight_in_the_file_is_caught",
               "tests/test_onnx.py::test_a_wrong_integer_is_caught"),
    ),
    Mutant(
        "any_row_is_padding", "export", "export/onnx/padding.py",
        "            if not bool((rows & ~padding", "            if not bool((rows & padding[:0].any() & ~padding",
        "Rows that the mask does not call padding may come of attention to nothing.",
        tests=("tests/test_onnx_padding.py::test_padding_that_reaches_other_rows_is_refused",),
    ),
    Mutant(
        "a_bound_of_infinity", "export", "lora_fx/checks/verification.py",
        "max(filter(math.isfinite, (relative_error(other, exact, exact) for other in others)), default=0.0)",
        "max((relative_error(other, exact, exact) for other in others), default=0.0)",
        "Where the float64 copy overflows, every file is the model.",
        tests=("tests/test_onnx_padding.py::test_a_number_that_is_not_finite_gives_no_bound",),
    ),
    Mutant(
        "the_dead_are_asked", "export", "export/onnx/processes.py",
        "if not _runners or not _runners[-1].alive:", "if not _runners:",
        "Once ONNX Runtime has crashed, no export of the process is checked any more.",
        tests=("tests/test_onnx_processes.py::test_it_is_started_once_and_again_where_it_has_ended",),
    ),
    Mutant(
        "other_shapes_not_run", "export", "export/onnx/runs.py",
        "    if not sizes:\n        return []", "    if sizes is not None:\n        return []",
        "A file with dynamic axes is only run at the size it was traced with.",
        tests=("tests/test_onnx.py::test_nested_keyword_inputs_and_integer_outputs",),
    ),
    Mutant(
        "optimizer_sees_the_weights", "export", "export/onnx/optimization.py",
        'if value.metadata_props.get(_KIND) != "PARAMETER":', 'if value.metadata_props.get(_KIND) != "BUFFER":',
        "The graph depends on the numbers: zero biases are dropped, equal weights merged.",
        tests=("tests/test_onnx.py::test_zeros_ones_and_equal_weights_leave_the_graph_alone",),
    ),
    Mutant(
        "proof_without_the_numbers", "export", "export/onnx/proof.py",
        "    if wrong:\n", "    if wrong < 0:\n",
        "A proof looks at the graph, and at no folded element.",
        tests=("tests/test_onnx_proof.py::test_one_element_one_bit_off_is_found",),
    ),
    Mutant(
        "proof_without_the_graph", "export", "export/onnx/proof.py",
        "        if mine != theirs:", "        if not (mine and theirs):",
        "A proof takes any graph for the base's.",
        tests=("tests/test_onnx_proof.py::test_another_graph_is_found",),
    ),
    Mutant(
        "any_trace_is_of_the_base", "export", "export/onnx/export.py",
        "            if same and adapted & made.blind.read <= made.blind.empty:\n",
        "            if adapted & made.blind.read <= made.blind.empty:\n",
        "A file with branches in it is held against itself, and proven.",
        tests=("tests/test_onnx_proof.py::test_branches_that_were_traced_are_found",),
    ),
    Mutant(
        "proof_of_what_numbers_have_made", "export", "export/onnx/export.py",
        "            if same and adapted & made.blind.read <= made.blind.empty:\n", "            if same:\n",
        "A graph that was optimized with a look at the folded numbers is held against itself, and proven.",
        tests=("tests/test_onnx_proof.py::test_a_graph_that_was_made_for_the_folded_numbers_is_found",),
    ),
    Mutant(
        "proof_holds_every_page", "export", "export/onnx/proof.py",
        "            actual.release()\n", "            pass\n",
        "In the end of a proof the whole file is in memory.",
        tests=("tests/test_onnx_proof.py::test_a_proof_maps_one_weight_after_another",),
    ),
    Mutant(
        "lengths_of_one_byte", "export", "export/onnx/files.py",
        "    while size >> 7:\n", "    while False:\n",
        "A file whose graph has more than 127 bytes cannot be written.",
        tests=("tests/test_onnx.py::test_float16_is_run",),
    ),
    Mutant(
        "nothing_is_checked", "export", "export/onnx/files.py",
        "        checked(path)\n", "        str(path)\n",
        "A file that is no ONNX is written, where ONNX Runtime does not run it.",
        tests=("tests/test_onnx.py::test_refusals_name_the_value_and_the_remedy_and_write_nothing",),
    ),
    Mutant(
        "quantised_weight_not_turned", "export", "export/onnx/quantization.py",
        "as_torch(weight.const_value).t().contiguous()", "as_torch(weight.const_value).contiguous()",
        "A Gemm that is taken apart multiplies by W where it was Wᵀ.",
        tests=("tests/test_onnx_quantization.py::test_numbers_that_fit_come_out_as_they_are_and_slots_stay_in_float",),
    ),
    Mutant(
        "slot_without_the_scale", "export", "export/onnx/switchable.py",
        "delta.whole * delta.scale", "delta.whole",
        "The files of switchable adapters lose the scale.",
        tests=("tests/test_sessions.py::test_each_adapter_is_torchs_in_plain_bound_and_asynchronous_runs",),
    ),
    Mutant(
        "every_slot_has_a_rank", "export", "export/onnx/switchable.py",
        "least = 0 if all(map(_may_be_empty, factors)) else 1", "least = 1",
        "Empty slots of plain matmuls are multiplied with, too.",
        tests=("tests/test_sessions.py::test_an_empty_slot_has_the_least_rank_that_the_runtime_survives",),
    ),
    Mutant(
        "cache_axes_of_other_names", "export", "export/onnx/targets.py",
        'TOKENS: {0: "batch_size",', 'TOKENS: {0: "batch",',
        "transformers.js makes a first cache for a batch of 0.",
        tests=("tests/test_runtimes.py::test_a_folder_says_the_tokens_of_torch_from_an_empty_cache_with_padding",),
    ),
    Mutant(
        "required_slots_have_defaults", "export", "export/onnx/switchable.py",
        "            if kind == OPTIONAL:\n", "            if kind:\n",
        "Runtimes in JavaScript give the base model for every adapter, without a word.",
        tests=("tests/test_runtimes.py::test_the_runtime_itself_asks_for_what_is_required",),
    ),
    Mutant(
        "tensors_of_any_digest", "export", "export/onnx/portable.py",
        "if said[_DIGEST] != found:", "if not found:",
        "An adapter with flipped bits is loaded.",
        tests=("tests/test_runtimes.py::test_damaged_and_foreign_files_of_tensors_are_refused",),
    ),
    Mutant(
        "zero_bias_of_two_axes", "export", "export/onnx/graphs.py",
        "custom_translation_table=_translations(opset),", "custom_translation_table=None,",
        "A conv3d without a bias is given one that the runtime refuses.",
        tests=("tests/test_onnx.py::test_a_convolution_without_a_bias_is_given_none",),
    ),
    Mutant(
        "quantised_slots", "export", "export/onnx/quantization.py",
        "    for name in slots:\n        model.graph.initializers.pop(name).const_value = None\n", "",
        "The defaults of a switchable graph's A and B are quantised as weights.",
        tests=("tests/test_onnx_quantization.py",),
    ),
    Mutant(
        "quantised_graph_of_the_float_one", "export", "export/onnx/quantization.py",
        "GRAPH: graph_digest(model)}", "}",
        "A quantised file is taken for the graph that it was made from.",
        tests=("tests/test_onnx_quantization.py",),
    ),
    Mutant(
        "damaged_graph_opens", "export", "export/onnx/loading.py",
        "    if (wanted if given is None else given) == found:\n", "    if wanted or given:\n",
        "A file that has some digest is taken for whole: a doubled weight is run.",
        tests=("tests/test_hostile_files.py::test_a_flipped_bit_is_refused",),
    ),
    Mutant(
        "external_data_of_anywhere", "export", "export/onnx/loading.py",
        "        if odd or name.is_absolute() or \"..\" in name.parts:\n", "        if odd:\n",
        "Numbers of a file come from a folder above its own.",
        tests=("tests/test_hostile_files.py::test_external_data_is_in_the_files_folder_and_inside_of_its_file",),
    ),
    Mutant(
        "damaged_task_runs", "export", "export/onnx/tasks.py",
        "            damaged = said.get(SEAL) != tensors_digest(of, raw)\n", "            damaged = SEAL not in said\n",
        "A task's weights with a flipped bit are run.",
        tests=("tests/test_hostile_files.py::test_a_flipped_bit_is_refused",),
    ),
    Mutant(
        "overlapping_adapters_run", "export", "export/onnx/sessions.py",
        "            if twice:\n", "            if not names:\n",
        "Of two adapters on one weight a session takes the last.",
        tests=("tests/test_sessions.py::test_what_the_runtime_would_do_in_silence_is_refused",),
    ),
    Mutant(
        "adapter_of_any_base", "export", "export/onnx/sessions.py",
        'if version != base:', 'if version < 0:',
        "A session runs an adapter that was trained on other base weights.",
        tests=("tests/test_sessions.py::test_a_model_whose_base_changed_saves_no_adapter_for_the_graph",),
    ),
    Mutant(
        "onnx_branch_without_its_scale", "export", "export/onnx/folding.py",
        "LowRank(layout, A, B, branch.scale / base.scale, rank)", "LowRank(layout, A, B, 1.0, rank)",
        "A file's branches are folded without their scale.",
        tests=("tests/test_onnx_folding.py::test_our_unfolded_file_folds_to_the_folded_file",),
    ),
    Mutant(
        "onnx_branch_of_another_input", "export", "export/onnx/branches.py",
        "        if self._source(base.x, by_rows) is not self._source(down.x, by_rows):", "        if base.x is None:",
        "Two narrow layers of another input are folded into the layer that they are added to.",
        tests=("tests/test_onnx_folding.py::test_what_is_not_a_branch_is_not_folded",),
    ),
    Mutant(
        "onnx_product_read_elsewhere", "export", "export/onnx/branches.py",
        "if len(readers) > 1 or value.is_graph_output():", "if not readers and not value.is_graph_output():",
        "What reads a product before its branches are added reads the folded one.",
        tests=("tests/test_onnx_folding.py::test_a_product_that_is_read_without_its_branch",),
    ),
    Mutant(
        "onnx_bottleneck_folded_unasked", "export", "export/onnx/branches.py",
        'or ("asked for by unnamed=True" if self.unnamed else "")', 'or "asked for by unnamed=True"',
        "A bottleneck that the model has itself is folded as an adapter.",
        tests=("tests/test_onnx_folding.py::test_a_bottleneck_of_the_models_own_is_folded_only_when_asked",),
    ),
    Mutant(
        "any_folded_file_passes", "export", "export/onnx/equality.py",
        "        if not comparison.equivalent:\n", "        if comparison is None:\n",
        "The folded file is run, and whatever it computes is taken.",
        tests=("tests/test_onnx_folding.py::test_a_wrong_fold_is_not_written",),
    ),
    Mutant(
        "checkpoint_shape_unchecked", "export", "export/onnx/weights.py",
        "        if shape != tuple(tensor.shape):", "        if len(shape) > 9:",
        "A weight of another shape goes from a checkpoint into the file.",
        tests=("tests/test_onnx_forms.py::test_checkpoints_that_do_not_fit_are_refused",),
    ),
    # ── adapter files ────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "alpha_pattern_ignored", "files", "export/adapters/peft.py",
        'return _values(folder, "alpha_pattern", targets, 8 if alpha is None else alpha)',
        "return dict.fromkeys(targets, 8 if alpha is None else alpha)",
        "A PEFT adapter with a scale for each layer is loaded with one for all.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "rank_pattern_ignored", "files", "export/adapters/peft.py",
        'return _values(folder, "rank_pattern", targets, folder.config.get("r") or 8)',
        'return dict.fromkeys(targets, folder.config.get("r") or 8)',
        "A PEFT adapter with a rank for each layer is read with one for all.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "last_pattern_decides", "files", "export/adapters/peft.py",
        "in reversed([*zip(table.values(), found, strict=True)]):",
        "in [*zip(table.values(), found, strict=True)]:",
        "Of two patterns that match a layer the last decides; PEFT takes the first.",
        tests=(GAPS,),
    ),
    Mutant(
        "square_conv1d_untransposed", "files", "export/adapters/peft.py",
        '{"conv1d": "io",', '{"conv1d": "io" if shape[0] != shape[1] else "oi",',
        "A, B of a square (in, out) weight are read as those of a Linear; no shape tells.",
        tests=("tests/test_adapter_files.py::test_peft_reads_what_we_save",),
    ),
    Mutant(
        "rslora_loaded_as_standard", "files", "export/adapters/peft_files.py",
        '"scaling": "rslora" if config.get("use_rslora") else "standard"', '"scaling": "standard"',
        "use_rslora of a PEFT adapter is ignored.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "out_proj_once", "files", "export/adapters/peft_files.py",
        "float(alphas[layer.target]) * layer.times", "float(alphas[layer.target])",
        "PEFT adds the delta of an attention's out_proj twice, and the loaded model once.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "exclude_ignored", "files", "export/adapters/peft.py",
        'return found - taken("exclude_modules")', "return found",
        "exclude_modules of a PEFT adapter is ignored.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "layers_ignored", "files", "export/adapters/peft.py",
        "found = found & ({*exact} | _in_layers(folder, paths))", "found = found & {*paths}",
        "layers_to_transform of a PEFT adapter is ignored.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "target_is_any_ending", "files", "export/adapters/peft.py",
        'path.endswith(f".{target}")', "path.endswith(target)",
        "The target 'lin' takes the module 'mylin' too.",
        tests=(GAPS,),
    ),
    Mutant(
        "options_skipped", "files", "export/adapters/peft.py",
        "if key in known or value is None", "if key in known or key in _REASONS or value is None",
        "Options that change what an adapter computes (a bias of the branch, whole modules) are skipped.",
        tests=("tests/test_adapter_files.py::test_options_that_are_refused",),
    ),
    Mutant(
        "another_base_accepted", "files", "export/adapters/peft.py",
        "or not torch.equal(base.detach().cpu().to(value.dtype), value)", "",
        "A file that carries another base weight is loaded as if it were the model's.",
        tests=("tests/test_adapter_files.py::test_damaged_folders",),
    ),
    Mutant(
        "digest_not_checked", "files", "export/adapters/folder.py",
        "if meta.get(DIGEST) != tensors_digest(meta[HEADER], io.BytesIO(data)):", "if DIGEST not in meta:",
        "Flipped bits in the numbers are loaded.",
        tests=("tests/test_adapter_files.py::test_flipped_bits_and_cut_files",),
    ),
    Mutant(
        "nan_loaded", "files", "export/adapters/folder.py",
        "if not bool(tensor.float().isfinite().all()):", "if False:",
        "A file with NaN is loaded.",
        tests=("tests/test_adapter_files.py::test_damaged_folders",),
    ),
    Mutant(
        "edited_settings_accepted", "files", "export/adapters/own.py",
        "        if config.get(key) != value:", "        if key not in config:",
        "A config that was edited after saving is half believed.",
        tests=("tests/test_adapter_files.py::test_settings_that_were_edited",),
    ),
    Mutant(
        "dropout_not_loaded", "files", "export/adapters/own.py",
        'float(entry["dropout"])', "0.0",
        "The dropout of a saved adapter is gone after loading.",
        tests=("tests/test_adapter_files.py::test_peft_reads_what_we_save",),
    ),
    Mutant(
        "experts_innermost", "files", "export/adapters/peft.py",
        "B.reshape(B.shape[0], rank, -1).permute(2, 0, 1)", "B.reshape(B.shape[0], -1, rank).permute(1, 0, 2)",
        "The experts' factors are read in the order of the rank.",
        tests=("tests/test_adapter_files.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "tied_copy_parted", "files", "export/adapters/beside.py",
        "names = ties if tie and name in ties else (name,)", "names = (name,)",
        "A copy that PEFT ties to the head is read by the embedding alone.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "rows_as_they_are_listed", "files", "export/adapters/beside.py",
        "order = sorted(range(len(rows)), key=rows.__getitem__)", "order = list(range(len(rows)))",
        "Rows of single tokens are taken in the order of the file for tokens in the order of the table.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "bias_of_the_branch_unscaled", "files", "export/adapters/beside.py",
        "(value.double() * scale)", "value.double()",
        "What lora_bias adds is not multiplied with alpha / rank.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "another_embedding_accepted", "files", "export/adapters/beside.py",
        "return first if first and bool(other[first:].all()) else None", "return first",
        "An embedding of another base is taken for one whose vocabulary was resized.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "what_trains_not_written", "files", "export/adapters/files.py",
        "held += _trained(model, name) if beside == SAVE else []", "held += []",
        "A head that has requires_grad is left out of the file without a word.",
        tests=("tests/test_peft_beside.py",),
    ),
    Mutant(
        "the_last_entry_counts", "files", "export/adapters/spelling.py",
        "if own in tensors and not (", "if False and not (",
        "Of two entries for one weight the last is taken, silently.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "alpha_in_the_file_ignored", "files", "export/adapters/entries.py",
        'key = keys.get("alpha")', "key = None",
        "kohya's alphas are not read: every scale is 1.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "another_part_dropped", "files", "export/adapters/entries.py",
        "if wanted is None and len(known) > 1:", "if False:",
        "Of a file for a UNet and a text encoder one is loaded, and the other dropped without a word.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "groups_side_by_side", "files", "export/adapters/loralib.py",
        "rows = tuple(range(group * width, (group + 1) * width))", "rows = tuple(range(k * width, (k + 1) * width))",
        "The factors of loralib's value group lie on the key's rows.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "sums_of_a_pickle_unread", "files", "export/adapters/pickles.py",
        "(damaged := archive.testzip()) is not None", "(damaged := None) is not None",
        "Flipped bits in the numbers of a pickle are loaded.",
        tests=("tests/test_adapter_dialects.py",),
    ),
    Mutant(
        "equal_shift_forgotten", "files", "export/adapters/peft_files.py",
        "torch.ldexp(delta.B, torch.tensor(shift))", "delta.B",
        "Parts of a fused weight with scales of their own are saved with one.",
        tests=("tests/test_adapter_files.py::test_peft_reads_what_we_save",),
    ),
    # ── kinds: their rows ────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "dora_starts_at_one", "kinds", "lora_fx/deltas/kinds.py",
        "theta.magnitude.copy_(dora.size(weight, theta))", "theta.magnitude.fill_(1)",
        "A fresh DoRA makes every output feature one long.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "dora_of_a_zero_feature", "kinds", "lora_fx/deltas/kinds.py",
        "if not bool(theta.magnitude.all()):", "if False:",
        "DoRA of a weight with a zero row divides 0 by 0.",
        tests=of_kinds("a_feature_without_a_direction_is_refused"),
    ),
    Mutant(
        "dora_without_magnitude", "kinds", "lora_fx/deltas/kinds.py",
        "theta.magnitude / dora.size(weight, theta) * dora.turned(weight, theta) - weight",
        "dora.turned(weight, theta) - weight",
        "Where W + δ is made, DoRA is plain LoRA.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says", "dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "bias_shifts_back", "kinds", "lora_fx/deltas/kinds.py",
        "delta=lambda weight, theta: theta.shift", "delta=lambda weight, theta: -theta.shift",
        "The shift of a bias is taken from it; whoever trains it does not notice.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    Mutant(
        "theta_for_theta_minus_w", "kinds", "lora_fx/deltas/kinds.py",
        "delta=lambda weight, theta: theta.weight - weight", "delta=lambda weight, theta: theta.weight",
        "`full` adds its weight to W instead of taking its place.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    # ── DoRA's arithmetic ────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "dora_without_scale", "kinds", "lora_fx/deltas/dora.py",
        "torch.addmm(weight, theta.B, theta.A, alpha=theta.scale)", "torch.addmm(weight, theta.B, theta.A)",
        "V is W + B·A, without its scale, in fold and forward and the checks' δ alike.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says", "dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "dora_of_experts_without_scale", "kinds", "lora_fx/deltas/dora.py",
        "return weight + theta.scale * (theta.B @ theta.A)", "return weight + theta.B @ theta.A",
        "The same where a weight has a matrix for each expert.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "dora_norm_not_detached", "kinds", "lora_fx/deltas/dora.py",
        "vector_norm(turned(weight, theta).detach(), dim=-1", "vector_norm(turned(weight, theta), dim=-1",
        "Gradients flow through the norm, except in a linear, which has gradients of its own.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_norm_over_the_outputs", "kinds", "lora_fx/deltas/dora.py",
        "turned(weight, theta).detach(), dim=-1, keepdim=True)",
        "turned(weight, theta).detach(), dim=-1 if weight.shape[-1] != weight.shape[-2] else -2, keepdim=True)",
        "Square weights have a norm for each input feature; no shape tells.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "dora_branch_with_c", "kinds", "lora_fx/deltas/dora.py",
        "product.features(c - 1) * product.base", "product.features(c) * product.base",
        "The branch adds x·Wᵀ once more: c is taken for c − 1.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_branch_without_magnitude", "kinds", "lora_fx/deltas/dora.py",
        "c = theta.magnitude / size(weight, theta)\n    return product",
        "c = torch.ones_like(theta.magnitude)\n    return product",
        "The branch of DoRA is LoRA's.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_forward_without_magnitude", "kinds", "lora_fx/deltas/dora.py",
        "F.linear(x, own.mul_(c), bias)", "F.linear(x, own, bias)",
        "A linear multiplies with V instead of W'.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_of_any_op_is_a_linear", "kinds", "lora_fx/deltas/dora.py",
        'if op != "linear" or torch', "if torch",
        "x·W with a square W is computed as x·Wᵀ.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_a_without_c", "kinds", "lora_fx/deltas/dora.py",
        "torch.mm((c * B).t(), g.t())", "torch.mm(B.t(), g.t())",
        "A of DoRA learns as if every c were 1, which it is at the start.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_a_without_scale", "kinds", "lora_fx/deltas/dora.py",
        ".mm(rows).mul_(ctx.scale)", ".mm(rows)",
        "A of DoRA learns at another rate than B.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_b_without_c", "kinds", "lora_fx/deltas/dora.py",
        ".mm(g).mul_(ctx.scale).t() * c", ".mm(g).mul_(ctx.scale).t()",
        "B of DoRA learns as if every c were 1.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_b_without_scale", "kinds", "lora_fx/deltas/dora.py",
        ".mm(g).mul_(ctx.scale).t() * c", ".mm(g).t() * c",
        "B of DoRA learns at another rate than A.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_m_not_divided", "kinds", "lora_fx/deltas/dora.py",
        "grad_m = (g * own).sum(0).unsqueeze(-1) / size", "grad_m = (g * own).sum(0).unsqueeze(-1)",
        "The magnitude's gradient is m times too large.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_m_with_the_bias", "kinds", "lora_fx/deltas/dora.py",
        "plain = y.clone() if bias is None else y - bias", "plain = y.clone()",
        "The magnitude learns from the bias too.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_a_magnitude_of_zero", "kinds", "lora_fx/deltas/dora.py",
        "if not bool((magnitude != 0).all()):", "if False:",
        "A magnitude of 0 gets the gradient 0 / 0.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_keeps_what_others_write", "kinds", "lora_fx/deltas/dora.py",
        "y.clone() if bias is None", "y if bias is None",
        "An in-place op behind a linear without a bias writes into what the magnitude's gradient is made of.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_gradient_of_x_through_w", "kinds", "lora_fx/deltas/dora.py",
        "torch.mm(g, torch.addmm(weight, B, A, alpha=ctx.scale).mul_(c))", "torch.mm(g, weight)",
        "What flows back to earlier layers goes through W instead of W'.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_second_order_through_constants", "kinds", "lora_fx/deltas/dora.py",
        "        if torch.is_grad_enabled():\n            return None", "        if False:\n            return None",
        "Second derivatives of DoRA's linear take its saved numbers for constants.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_second_order_through_the_norm", "kinds", "lora_fx/deltas/dora.py",
        "torch.linalg.vector_norm(own.detach(), dim=-1", "torch.linalg.vector_norm(own, dim=-1",
        "With create_graph=True the gradients flow through the norm.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    # ── adapted weights with deltas of other kinds ───────────────────────────────────────────────────────────────────
    Mutant(
        "dense_kind_lost_beside_a_branch", "kinds", "lora_fx/deltas/adapted_weight.py",
        "plain = weight.only(inside).dense() if inside else weight.base", "plain = weight.base",
        "Where a low-rank branch stands beside a matmul, what has none is left out.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "deltas_in_sequence", "kinds", "lora_fx/deltas/adapted_weight.py",
        "own = branch.delta.of(self.root)",
        "own = branch.delta.of(self.root if delta is None else self.root + delta)",
        "The second δ is one of W + the first: the order matters.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "bias_in_the_product", "kinds", "lora_fx/deltas/adapted_weight.py",
        'return self.out - (self._shaped(bias) if call.form.name == "conv" else bias if beta == 1 else beta * bias)',
        "return self.out",
        "The branch of DoRA scales the bias along with x·Wᵀ.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "bias_in_the_product_of_a_convolution", "kinds", "lora_fx/deltas/adapted_weight.py",
        'self._shaped(bias) if call.form.name == "conv" else', "self.out * 0 if call.form.name == 'conv' else",
        "The same of convolutions alone.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "beta_in_the_product", "kinds", "lora_fx/deltas/adapted_weight.py",
        "bias if beta == 1 else beta * bias)", "bias)",
        "addmm(b, x, W, beta=2) leaves half of its bias in what DoRA scales.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "features_of_a_part_unplaced", "kinds", "lora_fx/deltas/adapted_weight.py",
        "self.placement.up(None, self.adapter.embedded(values)).squeeze(-1)",
        "self.placement.up(None, self.adapter.embedded(values).roll(8, -2)).squeeze(-1)",
        "A part of a fused weight scales the first features instead of its own.",
        tests=of_kinds("dora_of_one_part_beside_its_matmul"),
    ),
    Mutant(
        "dora_alone_with_dropout", "kinds", "lora_fx/deltas/adapted_weight.py",
        "or dropped or not whole", "or not whole",
        "Dropout of DoRA never acts in a linear.",
        tests=of_kinds("dropout_of_dora_acts_on_its_branch_input_in_train_mode"),
    ),
    Mutant(
        "dora_alone_on_a_part", "kinds", "lora_fx/deltas/adapted_weight.py",
        "placement.is_whole and branch.adapter.rows is None and not self.cast", "placement.is_whole and not self.cast",
        "A part of a fused weight is taken for all of it.",
        tests=of_kinds("dora_of_one_part_beside_its_matmul"),
    ),
    Mutant(
        "dora_alone_on_a_slice", "kinds", "lora_fx/deltas/adapted_weight.py",
        "placement.is_whole and branch.adapter.rows is None", "branch.adapter.rows is None",
        "A linear with a view of the weight is given the whole of it.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "dora_base_not_dropped", "kinds", "lora_fx/deltas/adapted_weight.py",
        "call, out = replace(call, x=drop(call.x)), None", "call = replace(call, x=drop(call.x))",
        "With dropout DoRA scales what W makes of the whole input.",
        tests=of_kinds("dropout_of_dora_acts_on_its_branch_input_in_train_mode"),
    ),
    Mutant(
        "dora_not_dropped_on_embeddings", "kinds", "lora_fx/deltas/adapted_weight.py",
        "return own * drop(torch.ones_like(own[..., :1])) if drop is not None and call.form.looks_up else own",
        "return own",
        "Dropout of DoRA never acts where the weight is looked up.",
        tests=of_kinds("dropout_of_dora_on_an_embedding_takes_whole_tokens"),
    ),
    Mutant(
        "dora_with_groups", "kinds", "lora_fx/deltas/adapted_weight.py",
        "plain and usual and not placement.swapped", "plain and not placement.swapped",
        "The branch of DoRA takes convolutions with groups, and addmm with alpha, whose x·Wᵀ it makes without these.",
        tests=of_kinds("two_kinds_add_up_in_every_use"),
    ),
    Mutant(
        "dora_branch_of_the_input", "kinds", "lora_fx/deltas/adapted_weight.py",
        "usual and not placement.swapped", "usual",
        "A weight read transposed, with in and out changed over, has a size for each input feature.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "detached_weight_learns", "kinds", "lora_fx/deltas/adapter.py",
        "Dense(self.layout, lambda weight: self.of(weight).detach(), None)", "self",
        "W.detach() of a model has a gradient, of kinds without factors.",
        tests=of_kinds("every_use_and_its_gradients_are_those_of_the_adapted_weight"),
    ),
    Mutant(
        "part_of_another_place", "kinds", "lora_fx/deltas/adapter.py",
        "matrix.narrow(-2, first, len(self.rows))", "matrix.narrow(-2, 0, len(self.rows))",
        "A part of a fused weight is δ of its first rows, in branch and fold and the checks' δ alike.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "scattered_part_of_another_place", "kinds", "lora_fx/deltas/adapter.py",
        "matrix.index_select(-2, index)", "matrix.index_select(-2, index - index[0])",
        "The same of rows that are no contiguous range.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "part_put_at_the_front", "kinds", "lora_fx/deltas/adapter.py",
        'self.rows, self._buffers.get("index")).whole', "tuple(range(len(self.rows)))).whole",
        "δ of a part of a fused weight is added to its first rows.",
        tests=of_kinds("dora_of_a_part_is_that_of_its_own_rows"),
    ),
    Mutant(
        "matrix_in_the_weights_dtype", "kinds", "lora_fx/deltas/adapter.py",
        "return self._part(weight).to(self.dtype if weight.dtype != torch.float64 else weight.dtype)",
        "return self._part(weight)",
        "A kind is given a bfloat16 W beside its float32 θ.",
        tests=of_kinds("every_kind_in_every_dtype"),
    ),
    Mutant(
        "branch_while_recording", "kinds", "lora_fx/deltas/adapted_weight.py",
        "branch.delta.theta is None or recording.on or torch", "branch.delta.theta is None or torch",
        "A captured program has branches of a kind whose δ no check can follow.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "computed_factors_rounded", "kinds", "lora_fx/deltas/adapter.py",
        "wide = {name: p.detach().to(torch.float64)", "wide = {name: p.detach()",
        "Factors that a kind computes are rounded to float32 before they are folded.",
        tests=of_kinds("a_low_rank_kind_from_outside_has_branches_schedules_and_the_exact_fold"),
    ),
    # ── folds of other kinds ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "bias_folded_twice", "kinds", "lora_fx/deltas/rounded_sum.py",
        "total += adapter.delta(plain, adapter.theta_of(wide))",
        "total += adapter.delta(plain, adapter.theta_of(wide)) * (2 if adapter.kind.adapts == 'bias' else 1)",
        "A folded bias is shifted twice.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    Mutant(
        "folded_in_sequence", "kinds", "lora_fx/deltas/rounded_sum.py",
        "adapter.delta(plain, adapter.theta_of(wide))", "adapter.delta(total, adapter.theta_of(wide))",
        "The second δ that is folded is one of W + the first.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "only_the_first_is_folded", "kinds", "lora_fx/deltas/rounded_sum.py",
        "for adapter in adapters:", "for adapter in adapters[:1]:",
        "Of two adapters on one weight the first is folded.",
        tests=of_kinds("two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone"),
    ),
    Mutant(
        "sum_rounded_twice", "kinds", "lora_fx/deltas/rounded_sum.py",
        "round_once(total, dtype)", "round_once(total.float() if dtype.itemsize == 2 else total, dtype)",
        "The float64 sum goes to bfloat16 and float16 by way of float32.",
        tests=of_kinds("a_sum_is_rounded_once"),
    ),
    Mutant(
        "infinite_sum_folded", "kinds", "lora_fx/deltas/rounded_sum.py",
        "    if not finite:\n", "    if False:\n",
        "NaN in θ is folded into the weight.",
        tests=of_kinds("nan_in_theta_is_refused_before_anything_is_written"),
    ),
    Mutant(
        "original_not_kept", "kinds", "lora_fx/deltas/rounded_sum.py",
        "self._folded(), self.weight.clone()", "self._folded(), self.weight",
        "Unfolding writes back the folded weight.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "kept_weight_starts_anywhere", "kinds", "lora_fx/deltas/rounded_sum.py",
        "return same(checksum(weight), self.folded)", "return torch.tensor(True)",
        "A folded weight that was trained since is overwritten by unfold.",
        tests=of_kinds("a_folded_weight_that_was_written_to_is_not_unfolded"),
    ),
    Mutant(
        "fold_of_a_kind_not_undone", "kinds", "lora_fx/deltas/rounded_sum.py",
        "        undo.append(partial(self.weight.copy_, before))\n", "",
        "A fold that is cut short leaves the weights that it has written.",
        tests=of_kinds("a_fold_cut_short_is_undone"),
    ),
    Mutant(
        "unfold_of_a_kind_not_undone", "kinds", "lora_fx/deltas/rounded_sum.py",
        "        undo.append(partial(weight.copy_, weight.clone()))\n", "",
        "An unfold that is cut short leaves the weights that it has written.",
        tests=of_kinds("an_unfold_cut_short_is_undone"),
    ),
    Mutant(
        "bias_storages_left_out", "kinds", "lora_fx/model/inventory.py",
        "                if parameter is not None:\n",
        "                if parameter is not None and parameter.ndim > 1:\n",
        "What is no matrix is not folded.",
        tests=of_kinds("a_linear_of_each_kind_is_what_its_paper_says"),
    ),
    # ── checks of other kinds ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "no_delta_for_the_checks", "kinds", "lora_fx/checks/oracles.py",
        "return adapter.delta(weight.detach().to(torch.float64), _wide(adapter))",
        "return torch.zeros_like(weight, dtype=torch.float64)",
        "The checks take a kind without factors for nothing.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "any_sum_is_rounded_right", "kinds", "lora_fx/checks/oracles.py",
        "SHARE = 2.0**-46", "SHARE = 2.0**40",
        "Whatever a fold of such a kind has written, the checks find it right.",
        tests=of_kinds("the_checks_find_every_element_that_is_one_step_off"),
    ),
    Mutant(
        "one_step_off_is_right", "kinds", "lora_fx/checks/oracles.py",
        "right = ((low + value) / 2 - lost <= total) & (total <= (value + high) / 2 + lost)",
        "right = (low - lost <= total) & (total <= high + lost)",
        "The checks take the next number but one for the nearest.",
        tests=of_kinds("the_checks_find_every_element_that_is_one_step_off"),
    ),
    Mutant(
        "self_check_leaves_theta_at_its_start", "kinds", "lora_fx/checks/verification.py",
        "            scatter(adapter, weight, generator, 0.5)\n", "            pass\n",
        "apply looks at kinds without factors where their δ is 0.",
        tests=of_kinds("the_self_check_moves_theta_of_every_kind"),
    ),
    Mutant(
        "mixed_not_followed", "kinds", "lora_fx/checks/flow.py",
        "if (own := self.factors.get(n) or self.mixed.get(n))", "if (own := self.factors.get(n))",
        "A sum with a δ that is made of W is not known for one.",
        tests=of_kinds("every_verb_takes_every_kind"),
    ),
    Mutant(
        "two_sums_are_one", "sites", "lora_fx/checks/flow.py",
        "if plain and _is_add(node) and any(", "if _is_add(node) and any(",
        "Of two adapted weights that are added before they multiply, the certificate holds one.",
        tests=of_sites("a sum of two"),
    ),
    Mutant(
        "certificate_writes_into_the_model", "sites", "lora_fx/checks/uses.py",
        "return own.clone() if argument in written else own", "return own",
        "A use in place is held against one that has been written into already.",
        tests=("tests/test_certificate.py::test_what_writes_in_place_is_measured_as_it_is",),
    ),
    Mutant(
        "uses_of_constants_uncounted", "sites", "lora_fx/checks/flow.py",
        "used = pure and bool(carried) and self._multiplies(node)", "used = False",
        "A Linear on a constant is taken for a part of the next weight.",
        tests=of_sites("linears on a constant"),
    ),
    Mutant(
        "scales_are_sites", "sites", "lora_fx/graph/program.py",
        "matrices = [n for n in made_of if not whole or", "matrices = [n for n in made_of if True or",
        "The gain of a standardised weight is adapted beside it.",
        tests=of_sites("a gain on it"),
    ),
    Mutant(
        "axes_of_computed_weights_forgotten", "sites", "lora_fx/graph/program.py",
        "_Seen(seen.weight, _axes(node, name, n, seen.view))", "_Seen(seen.weight, None)",
        "A mask makes the input features of a weight its outputs, and its experts one matrix.",
        tests=of_sites("mask of experts"),
    ),
    Mutant(
        "tables_are_modulated_weights", "sites", "lora_fx/graph/program.py",
        "size > 1 and all(_size(n, axis) == 1 for n in scales)", "True",
        "A table that scales activations is taken for a weight that they scale.",
        tests=of_sites("a table that scales activations is none"),
    ),
    Mutant(
        "weights_in_a_cond_not_told", "sites", "lora_fx/graph/program.py",
        "            if name in _BRANCHING:\n", "            if name in ():\n",
        "A weight that a branch of torch.cond multiplies with is left out without a word.",
        tests=("tests/test_sites.py::test_weights_inside_of_a_cond_are_refused_and_the_others_are_sites",),
    ),
    Mutant(
        "hooks_in_a_cond", "sites", "lora_fx/graph/capture.py",
        "        if torch.compiler.is_dynamo_compiling():  # a", "        if False:  # a",
        "A model that calls modules in a branch of torch.cond is not captured.",
        tests=("tests/test_sites.py::test_weights_inside_of_a_cond_are_refused_and_the_others_are_sites",),
    ),
    Mutant(
        "parts_counted_from_their_own_start", "verification", "lora_fx/checks/oracles.py",
        "found.append(wrong + start * row)", "found.append(wrong)",
        "Of a large weight the wrong elements are those of its first part.",
        tests=("tests/test_testing.py::test_misrounded_elements_are_those_that_fractions_call_misrounded",),
    ),
    Mutant(
        "autocast_unknown", "sites", "lora_fx/graph/program.py",
        "for d in (dtype, *made))", "for d in (dtype,))",
        "A model with autocast in its forward is held to float32's bounds, and refused.",
        tests=("tests/test_sites.py::test_autocast_inside_the_forward",),
    ),
    Mutant(
        "casts_of_a_check_are_kept", "sites", "lora_fx/graph/own_state.py",
        "        self.undo.append(torch.clear_autocast_cache)\n", "",
        "Under autocast a fresh adapter computes with the numbers that the self-check filled in.",
        tests=("tests/test_sites.py::test_autocast_around_apply",),
    ),
    Mutant(
        "first_refusal_alone", "sites", "passes/planning.py",
        "raise PlanError.of(refusals)", "raise refusals[0]",
        "Each call names one of the weights that cannot be adapted.",
        tests=("tests/test_refusals.py::test_all_that_cannot_be_adapted_is_in_one_message",),
    ),
    Mutant(
        "skipped_by_any_rule", "sites", "passes/planning.py",
        "if rule.otherwise != SKIP or rule not in left]", "if rule not in left]",
        "A rule that must refuse leaves out what it cannot adapt.",
        tests=("tests/test_refusals.py::test_leaving_out_holds_for_the_rule_that_says_so",),
    ),
    Mutant(
        "autocorrelation_is_a_router", "roles", "lora_fx/analysis/dataflow.py",
        "union(f.frontier for f in told if not f.pair and not f.spectral)", "union(f.frontier for f in told)",
        "Query and key of an attention by autocorrelation are routers.",
        tests=("tests/test_roles.py::test_what_mixes_tokens_is_no_router_and_no_mlp",),
    ),
    Mutant(
        "time_mixing_is_an_mlp", "roles", "lora_fx/analysis/dataflow.py",
        "        if self._is_pair(node, self.fact(gate), self.fact(up)):", "        if False:",
        "Receptance, key and value are gate and up.",
        tests=("tests/test_roles.py::test_what_mixes_tokens_is_no_router_and_no_mlp",),
    ),
    Mutant(
        "second_use_of_a_bias_forgotten", "kinds", "passes/planning.py",
        "uses = (*found[key].uses, *row.uses) if key in found else row.uses", "uses = row.uses",
        "A bias of two weights is adapted for the last of them.",
        tests=of_kinds("a_bias_that_others_read_too_is_refused"),
    ),
    Mutant(
        "bias_that_others_read", "kinds", "passes/planning.py",
        "    if others:\n        raise PlanError(\n            f\"{row.rule.label} adapts {len(row.uses)}",
        "    if not row:\n        raise PlanError(\n            f\"{row.rule.label} adapts {len(row.uses)}",
        "A rule for one layer shifts the bias of another along with it.",
        tests=of_kinds("a_bias_that_others_read_too_is_refused"),
    ),
    Mutant(
        "part_of_another_bias", "kinds", "passes/planning.py",
        "if row.rows is not None and bias.parameter.numel() != features:", "if False:",
        "A part of a fused weight adapts elements that its bias does not have.",
        tests=of_kinds("a_part_of_a_weight_whose_bias_is_one_number_has_none_of_its_own"),
    ),
    Mutant(
        "casts_of_a_bias_not_followed", "kinds", "lora_fx/analysis/biases.py",
        "first_operand(node) if name in MOVES or name in COPIES or name in CASTS else None",
        "first_operand(node) if name in COPIES else None",
        "A bias that is moved or cast before it is added is none.",
        tests=of_kinds("a_bias_is_found_behind_views_and_casts"),
    ),
    Mutant(
        "bias_that_is_added_not_found", "kinds", "lora_fx/analysis/biases.py",
        'in ("add", "add_", "__add__", "__iadd__")]', "in ()]",
        "x @ W + b has no bias.",
        tests=of_kinds("a_bias_is_found_where_it_is_added"),
    ),
    # ── files of other kinds ─────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "settings_of_a_kind_not_saved", "kinds", "export/adapters/values.py",
        '"kind": a.kind.name, "settings": dict(a.settings)}',
        '"kind": a.kind.name, "settings": {k: v for k, v in a.settings.items() if k == "rank"}}',
        "The scale of a saved DoRA is 1 after loading.",
        tests=of_kinds("saved_and_loaded_it_is_the_same_adapter"),
    ),
    Mutant(
        "kind_not_saved", "kinds", "export/adapters/values.py",
        'if a.kind.name != "lora":\n            return {**said', "if not a.settings:\n            return {**said",
        "DoRA is saved as LoRA.",
        tests=of_kinds("saved_and_loaded_it_is_the_same_adapter"),
    ),
    Mutant(
        "magnitude_kept_at_its_start", "kinds", "passes/insert.py",
        "        for tensor, numbers in stored.items():\n", "        for tensor, numbers in [*stored.items()][:2]:\n",
        "Of a saved DoRA the factors are loaded, and the magnitude is 0.",
        tests=of_kinds("saved_and_loaded_it_is_the_same_adapter"),
    ),
    Mutant(
        "use_dora_not_said", "kinds", "export/adapters/peft_files.py",
        '"use_dora": dora,', '"use_dora": False,',
        "PEFT is given a DoRA as a LoRA.",
        tests=of_kinds("dora_for_peft_and_back"),
    ),
    Mutant(
        "dora_loaded_as_lora", "kinds", "export/adapters/peft_files.py",
        'kind_named("dora" if config.get("use_dora") else "lora")', 'kind_named("lora")',
        "use_dora of a PEFT adapter is ignored.",
        tests=of_kinds("dora_for_peft_and_back"),
    ),
    Mutant(
        "magnitude_of_a_convolution_flat", "kinds", "export/adapters/peft.py",
        'return (1, out, *[1] * (len(self.layout.shape) - 2)) if self.kind == "conv" else (out,)', "return (out,)",
        "PEFT cannot load the magnitude of a convolution.",
        tests=of_kinds("dora_for_peft_and_back"),
    ),
    Mutant(
        "dora_of_attention_for_peft", "kinds", "export/adapters/peft.py",
        'return "" if known else f"PEFT has no DoRA', 'return "" if self.path is not None else f"PEFT has no DoRA',
        "A DoRA is written for a module that PEFT has none for.",
        tests=of_kinds("dora_of_attention_is_refused_for_peft"),
    ),
    Mutant(
        "part_of_dora_for_peft", "kinds", "export/adapters/peft_files.py",
        'if kind == "dora" and h.adapter.rows is not None:', "if False:",
        "A DoRA of a part of a weight is written as one of all of it.",
        tests=of_kinds("a_part_of_dora_is_refused_for_peft"),
    ),
    Mutant(
        "dora_read_outside_for_peft", "kinds", "export/adapters/peft_files.py",
        'if h.adapter.read_outside and layer.kind != "attention":', "if False:",
        "A DoRA whose weight another module reads is written for PEFT, which adapts calls alone.",
        tests=of_kinds("dora_of_a_weight_that_another_module_reads_is_refused_for_peft"),
    ),
    Mutant(
        "two_kinds_for_peft", "kinds", "export/adapters/peft_files.py",
        "        if len(kinds) > 1:\n", "        if not kinds:\n",
        "A LoRA beside a DoRA is written as one.",
        tests=of_kinds("what_peft_has_no_kind_for_is_refused"),
    ),
    # ── the trial of a kind from outside ─────────────────────────────────────────────────────────────────────────────
    Mutant(
        "start_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(not bool(own.any()), reason, remedy)", "self.require(own is not None, reason, remedy)",
        "A kind whose fresh adapter changes the model is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "shape_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(fits, f\"{name} is {got}", "self.require(True, f\"{name} is {got}",
        "A kind whose δ has other axes than W is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "writing_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        'self.require(same, "δ writes', 'self.require(True, "δ writes',
        "A kind whose δ changes W is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "drawing_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "torch.equal(own, self._delta(wide, weight, seed=1)), \"δ is another", "own is not None, \"δ is another",
        "A kind with another δ each time is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "gradients_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(not missed, ", "self.require(True, ",
        "A kind with a tensor that never learns is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "narrow_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "        self._check_narrow(wide, weight, own)\n", "",
        "A kind that is another one in float32 is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "wide_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "        self._check_wide(wide, weight, own)\n", "",
        "A kind that rounds to float32 on the way is taken, and its folds with it.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "branch_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "            off <= bound and len(pairs) == 1 + len(inputs),\n", "            True,\n",
        "A kind whose branch is not x·δᵀ is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    Mutant(
        "names_not_tried", "kinds", "lora_fx/deltas/kind_registration.py",
        "self.require(not taken, ", "self.require(True, ",
        "A kind with a tensor called `layout` is taken.",
        tests=of_kinds("a_wrong_row_is_refused_and_the_table_is_what_it_was"),
    ),
    # ── rules, plans, ONNX and strategies of other kinds ─────────────────────────────────────────────────────────────
    Mutant(
        "settings_of_another_kind", "kinds", "lora_fx/deltas/kinds.py",
        "            if name not in self.settings:\n", "            if not name:\n",
        "kind='full', rank=4 is no error.",
        tests=of_kinds("settings_that_a_kind_does_not_have"),
    ),
    Mutant(
        "required_setting_not_given", "kinds", "lora_fx/deltas/kinds.py",
        "for name, value in settings.items() if value is REQUIRED]", "for name in () if settings[name] is REQUIRED]",
        "A DoRA without a rank is found out late.",
        tests=of_kinds("settings_that_a_kind_does_not_have"),
    ),
    Mutant(
        "dropout_where_no_branch_stands", "kinds", "passes/planning.py",
        " or not (row.kind.low_rank or _has_product(u, row.kind))]", "]",
        "Dropout of DoRA is planned on a convolution with groups, and found out when the model trains.",
        tests=of_kinds("dropout_needs_a_branch_of_the_kind"),
    ),
    Mutant(
        "every_kind_folds_exactly", "kinds", "passes/planning.py",
        '"exactly" if kind.low_rank else "rounded once"', '"exactly"',
        "The plan promises more than the fold does.",
        tests=of_kinds("the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds"),
    ),
    Mutant(
        "plan_counts_like_lora", "kinds", "passes/planning.py",
        "return sum(math.prod(shape) for shape in self.kind.shapes(self.space).values())",
        "return sum(math.prod(shape) for shape in [*self.kind.shapes(self.space).values()][:2])",
        "The plan leaves the magnitudes out.",
        tests=of_kinds("the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds"),
    ),
    Mutant(
        "plan_without_the_cost", "kinds", "passes/planning.py",
        'return "its own branch" if beside else f"{row.kind.adapts} + δ"', 'return "its own branch"',
        "The plan does not say that W + δ is made in each forward.",
        tests=of_kinds("the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds"),
    ),
    Mutant(
        "onnx_without_dense_kinds", "kinds", "export/onnx/weights.py",
        "return rounded_sum(loaded, self.adapters, self.dtype, self.name)", "return loaded.to(self.dtype)",
        "A folded file holds the base weight where a kind has no factors.",
        tests=of_kinds("a_folded_file_of_every_kind_is_proven"),
    ),
    Mutant(
        "dense_kind_in_a_switchable_file", "kinds", "export/onnx/switchable.py",
        "        if not place.adapter.kind.low_rank:\n", "        if not place.weight:\n",
        "A switchable graph of a kind without factors is begun, and fails somewhere.",
        tests=of_kinds("a_switchable_file_wants_factors"),
    ),
    Mutant(
        "settings_not_in_the_digest", "kinds", "export/onnx/weights.py",
        "else [adapter.kind.name, dict(adapter.settings)]", "else adapter.kind.name",
        "DoRAs with other scales are one and the same to a folded file.",
        tests=of_kinds("a_file_knows_the_settings_of_a_dense_kind"),
    ),
    Mutant(
        "scale_baked_into_forwards", "settings", "passes/rewriting.py",
        'scale = self.attribute(f"{path}.scale")', "scale = adapter.scale",
        "A generated forward goes on with the scale that the adapter had when it was made.",
    ),
    Mutant(
        "scale_baked_by_a_pickle", "settings", "lora_fx/deltas/adapter.py",
        "if is_fx_symbolic_tracing():", "if False:",
        "A GraphModule out of a pickle goes on with the scale that it was pickled with.",
    ),
    Mutant(
        "dropout_set_in_vain", "settings", "lora_fx/deltas/adapter.py",
        "        if value != 0:", "        if False:",
        "A dropout that no forward calls can be set, and nothing is dropped.",
    ),
    Mutant(
        "frozen_again_by_each_apply", "settings", "lora_fx/model/training.py",
        "if not inventory(model).adapters:", "if True:",
        "A second adapter freezes the head that the user lets train.",
    ),
    Mutant(
        "activated_all_of_it_trains", "settings", "lora_fx/deltas/adapter.py",
        "names = self._trained if whether else", "names = tuple(self._parameters) if whether else",
        "A frozen A trains after the adapter was deactivated and activated.",
    ),
    Mutant(
        "refused_switch_half_done", "settings", "passes/activate.py",
        "facts.undo.append(Acting.of(adapter).restore)  # a fold may", "pass  # a fold may",
        "After a refused switch, other adapters are active than before.",
    ),
    Mutant(
        "trained_beside_left_out", "settings", "lora_fx/model/training.py",
        "if beside != REFUSE or not (trained := trained_beside(model)):", "if True:",
        "save_adapter leaves out a head that trains, without a word.",
    ),
    Mutant(
        "branch_outside_of_a_forward", "settings", "export/adapters/peft.py",
        "if owner not in _KNOWN and not", "if False and not",
        "A Linear subclass with a forward of its own is saved as a module for PEFT, which adds the branch outside.",
        tests=("tests/test_adapter_files.py",),
    ),
    Mutant(
        "branch_outside_of_a_hook", "settings", "export/adapters/peft.py",
        "if foreign is not None:", "if False:",
        "A module with a hook is saved as a module for PEFT, which runs the hook around the base alone.",
        tests=("tests/test_adapter_files.py",),
    ),
    Mutant(
        "kinds_not_drawn", "kinds", "lora_fx/testing/strategies.py",
        "        kind = draw(st.sampled_from(kinds))\n        fitting", '        kind = "lora"\n        fitting',
        "The laws of a kind are laws of `lora`.",
        tests=of_kinds("rules_and_theta_are_drawn_for_the_kind"),
    ),
    Mutant(
        "drawn_theta_at_its_start", "kinds", "lora_fx/testing/strategies.py",
        "                scatter(adapter, place.parameter, generator, self.size)\n                continue",
        "                continue",
        "The laws of a kind are tried where its δ is 0.",
        tests=of_kinds("rules_and_theta_are_drawn_for_the_kind"),
    ),
    # ── histories: what holds a model against its dense twin ─────────────────────────────────────────────────────────
    Mutant(
        "histories_forgive", "histories", "lora_fx/testing/agreement.py",
        "        return SLACK * max(noise_floor(b, moved), least)\n", "        return 1.0\n",
        "A history may be off by as much as there is.",
        tests=(f"{HISTORIES}::test_a_defect_in_a_history_is_found_and_named[a buffer]",),
    ),
    Mutant(
        "histories_weights_give_way", "histories", "lora_fx/testing/agreement.py",
        "untouched = isinstance(b, nn.Parameter) and not self.folded", "untouched = False",
        "A base weight may move by rounding.",
        tests=(f"{HISTORIES}::test_a_defect_in_a_history_is_found_and_named[a changed weight]",),
    ),
    Mutant(
        "histories_gradients_unasked", "histories", "lora_fx/testing/agreement.py",
        "(a.dtype, a.shape, a.requires_grad) != (b.dtype, b.shape, b.requires_grad)",
        "(a.dtype, a.shape) != (b.dtype, b.shape)",
        "Whether a tensor has a gradient is not compared.",
        tests=(f"{HISTORIES}::test_a_defect_in_a_history_is_found_and_named[a lost gradient]",),
    ),
    Mutant(
        "histories_outputs_forgotten", "histories", "lora_fx/testing/histories.py",
        "    life.kept.append(output)\n", "",
        "What an earlier call returned may be written to.",
        tests=(f"{HISTORIES}::test_an_output_that_a_later_call_writes_to_is_found",),
    ),
    Mutant(
        "dense_twin_is_the_base", "histories", "lora_fx/testing/twins.py",
        "                total = total + record.delta(base).to(torch.float64)\n", "                pass\n",
        "The dense twin has no δ in its weights.",
        tests=(f"{HISTORIES}::test_every_kind_of_step_in_one_history",),
    ),
    Mutant(
        "dense_twin_trains_nothing", "histories", "lora_fx/testing/twins.py",
        "                    tensor -= _RATE * gradient\n", "                    pass\n",
        "θ of the dense twin stays where it is.",
        tests=(f"{HISTORIES}::test_every_kind_of_step_in_one_history",),
    ),
    # ── changes: wholly or not at all, while the model rests ─────────────────────────────────────────────────────────
    Mutant(
        "changed_while_it_runs", "changes", "lora_fx/changes.py",
        "        _refuse_running(model, verb)\n", "",
        "A verb changes a model that another thread is running.",
    ),
    Mutant(
        "numbers_not_rolled_back", "changes", "lora_fx/changes.py",
        "                _roll_back(undo)\n", "",
        "A fold that runs out of memory leaves the weights that it has written.",
        tests=("tests/test_faults.py::test_no_memory_at_any_operation_leaves_the_model_bitwise_what_it_was",),
    ),
    Mutant(
        "signals_do_not_wait", "changes", "lora_fx/changes.py",
        "        if not _signals.waits:\n            self.handler", "        if True:\n            self.handler",
        "Ctrl-C comes wherever a verb is, and leaves torch patched.",
        tests=(f"{INTERRUPTS}::test_signals_wait_for_the_end_of_the_outermost_block_and_come_in_their_order",),
    ),
    Mutant(
        "no_safe_point_while_recording", "changes", "lora_fx/graph/capture.py",
        "        safe_point()\n        return create", "        return create",
        "A capture cannot be stopped before it has run the model.",
        tests=(f"{INTERRUPTS}::test_what_a_handler_raises_is_not_taken_for_the_models_own_error",),
    ),
    Mutant(
        "a_later_signal_is_lost", "changes", "lora_fx/changes.py",
        "        _let_in(due[1:], frame)\n", "        pass\n",
        "Of two signals that wait the handler of one runs.",
        tests=(f"{INTERRUPTS}::test_no_exception_is_lost",),
    ),
    Mutant(
        "a_timeout_is_the_models_own_error", "changes", "lora_fx/changes.py",
        "            raise _Passing(error) from error\n", "            raise\n",
        "What a timer's handler raises in a capture is taken for an error of the model.",
        tests=(f"{INTERRUPTS}::test_what_a_handler_raises_is_not_taken_for_the_models_own_error",),
    ),
    Mutant(
        "profiler_in_c_taken_out", "changes", "lora_fx/changes.py",
        "TRACER if TRACER.read() is None or written_in_c else PROFILER", "PROFILER",
        "After an apply inside cProfile every call fails.",
        tests=("tests/test_tracing.py::test_a_profiler_in_c_goes_on_after_the_calls_were_seen",),
    ),
    Mutant(
        "gradient_mode_left_off", "changes", "lora_fx/changes.py",
        "            switch.turn(was)\n", "            pass\n",
        "After Ctrl-C in a verb nothing has gradients any more.",
        tests=("tests/test_faults.py::test_an_exception_leaves_torchs_switches_as_they_were",),
    ),
    # ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "no_gradient_is_no_fault", "gradients", "lora_fx/checks/certification.py",
        "        _refuse_lost(model, inputs, adapters, undo)\n", "        pass\n",
        "A model whose autograd function takes the weight gives right outputs, and its adapter never trains.",
        tests=(f"{GRADIENTS}::test_who_wants_a_plain_tensor_gets_the_sum_and_theta_its_gradient",),
    ),
    Mutant(
        "lost_where_there_is_none", "gradients", "lora_fx/checks/gradients.py",
        "if adapter in apart & wanted)", "if adapter in apart)",
        "A weight that the model itself does not train is refused.",
        tests=(f"{GRADIENTS}::test_what_has_no_gradient_in_the_model_itself_is_not_lost",),
    ),
    Mutant(
        "lost_is_certified", "gradients", "lora_fx/checks/certification.py",
        "return right and not self.gradient_lost", "return right",
        "A certificate is true of a model that does not train.",
        tests=(f"{GRADIENTS}::test_a_model_whose_gradient_is_lost_is_not_certified",),
    ),
    Mutant(
        "dropout_without_a_branch", "gradients", "passes/insert.py",
        "and not a.drops and _has_delta(a) for a in alike", "and _has_delta(a) for a in alike",
        "A weight that is read as the sum W + δ has a dropout, and the first training step raises.",
        tests=(f"{GRADIENTS}::test_a_dropout_has_no_branch_there_and_is_refused",),
    ),
    Mutant(
        "broken_kind_is_served_dense", "gradients", "passes/insert.py",
        "isinstance(error, NotServed) and alike", "alike",
        "A kind whose branch is wrong is read as the sum, and nobody hears of it.",
        tests=("tests/test_kinds.py::test_the_self_check_moves_theta_of_every_kind",),
    ),
    Mutant(
        "all_are_read_as_the_sum", "gradients", "passes/insert.py",
        "if kinds & set(map(_held, s.owners)) for a", "for a",
        "One autograd function, and no weight of the model is adapted by a branch.",
        tests=(f"{GRADIENTS}::test_only_they_are_read_so",),
    ),
    Mutant(
        "padding_trains", "gradients", "lora_fx/graph/forms.py",
        "torch.where((indices == index).unsqueeze(-1), out.detach(), out)", "out",
        "Tokens of padding train A and B, and the row of W + δ would get nothing.",
        tests=(f"{GRADIENTS}::test_padding_trains_nothing",),
    ),
    Mutant(
        "other_paddings_train", "gradients", "lora_fx/graph/forms.py",
        "        if not weight_first:\n            return None\n", "",
        "F.embedding counts a negative index from the end, and its row trains A and B.",
        tests=(f"{GRADIENTS}::test_padding_trains_nothing",),
    ),
    Mutant(
        "class_attributes_of_ours", "gradients", "lora_fx/model/classes.py",
        "setattr(base, name, value) if base else type.__setattr__", "type.__setattr__",
        "`type(self).calls += 1` counts on a class that is gone with the adapter.",
        tests=("tests/test_dispatch.py::test_what_code_sets_on_type_self_lands_on_the_models_own_class",),
    ),
    Mutant(
        "adapters_left_in_eval_mode", "gradients", "lora_fx/graph/own_state.py",
        "partial(setattr, module, \"training\", module.training)", "partial(int)",
        "After an export or a capture dropouts of adapters are off.",
        tests=("tests/test_onnx.py::test_flags_gradients_and_random_state_stay",),
    ),
    Mutant(
        "mixed_output_is_a_head", "gradients", "lora_fx/analysis/roles.py",
        "return LM_HEAD if bit & flow.unmixed", "return LM_HEAD if bit & flow.out",
        "The last layer of a model with several residual streams is taken for its head.",
        tests=("tests/test_roles.py::test_what_is_mixed_before_it_is_returned_is_no_head",),
    ),
    Mutant(
        "written_product_made_again", "gradients", "lora_fx/deltas/rematerialization.py",
        "    if tensor._version:", "    if False:",
        "A product that was written to without gradients is made again as it was before.",
        tests=("tests/test_rematerialization.py::test_a_product_that_was_written_to_is_kept_as_it_is",),
    ),
    Mutant(
        "backward_autocasts", "gradients", "lora_fx/deltas/schedules.py",
        "        if _autocasts():  # it", "        if False:  # it",
        "A backward inside of autocast raises, where the forward was outside.",
        tests=("tests/test_schedules.py::test_a_backward_inside_of_autocast_is_that_of_its_forward",),
    ),
    # ── where parameters live ────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "factors_put_away", "places", "lora_fx/graph/places.py",
        "                own.pre_forward(self)\n                own.offload = False\n", "",
        "accelerate puts the factors away until somebody calls their module, which nobody does: garbage.",
    ),
    Mutant(
        "offloaded_unchecked", "places", "lora_fx/checks/verification.py",
        "    total = weight.to(torch.float64) + delta(weight, *storage.adapters)\n    if step",
        "    total = weight.to(torch.float64)\n    if step",
        "The check of an offloaded model holds it against the plain weights.",
    ),
    Mutant(
        "shards_captured", "places", "lora_fx/graph/capture.py",
        "    refuse_shards(model)\n", "",
        "A model in parts is captured, and waits for the other processes.",
    ),
    Mutant(
        "real_part_alone", "places", "lora_fx/checks/verification.py",
        "torch.view_as_real(tensor.resolve_conj()) if", "tensor.real if",
        "Two models that differ in the imaginary part of an output are called one function.",
    ),
    Mutant(
        "storages_by_luck", "places", "lora_fx/graph/program.py",
        "    if storage == id(tensor):\n        return (storage,)\n", "",
        "A tensor without a storage is asked for its strides.",
    ),
    Mutant(
        "a_sum_laid_out_anew", "schedules", "lora_fx/deltas/schedules.py",
        "    return result.as_strided(result.shape, strides)", "    return result",
        "An axis of one element gets another stride, and torch's convolutions round in another order.",
    ),
    Mutant(
        "branch_of_another_is_a_use", "verification", "lora_fx/checks/flow.py",
        "        return found if own.isdisjoint(found) else frozenset()", "        return frozenset()",
        "The branch of a weight that multiplies another adapted weight counts as one more use of that.",
        tests=("tests/test_certificate.py::test_the_branch_of_another_weight_is_no_use_of_this_one",),
    ),
    Mutant(
        "casts_unseen", "verification", "lora_fx/checks/verification.py",
        "        if rounding.step <= stored:\n            return stored\n", "        return stored\n",
        "The noise of a model that multiplies in a narrower dtype than its weights' is measured as of theirs.",
        tests=("tests/test_mutant_gaps.py::test_a_weight_is_rounded_as_it_is_multiplied_with",),
    ),
    Mutant(
        "budget_keeps_the_least", "kinds", "lora_fx/application/budget.py",
        "scores.argsort(descending=True, stable=True)", "scores.argsort(stable=True)",
        "The budget keeps the singular values that matter least.",
        tests=("tests/test_budget.py::test_the_most_important_ones_act_by_the_formulas_of_the_paper",),
    ),
    Mutant(
        "importance_without_vectors", "kinds", "lora_fx/application/budget.py",
        'own["singular"].squeeze(-1) + own["P"].mean(-2) + own["Q"].mean(-1)', 'own["singular"].squeeze(-1)',
        "The importance of a singular value leaves out its two vectors.",
        tests=("tests/test_budget.py::test_the_most_important_ones_act_by_the_formulas_of_the_paper",),
    ),
    Mutant(
        "suggests_without_costs", "kinds", "lora_fx/application/suggestion.py",
        "((own / costs[n], n) for n, values", "((own, n) for n, values",
        "Ranks are given to where the loss falls most, whatever they cost.",
        tests=("tests/test_suggest.py::test_no_choice_of_as_many_parameters_decreases_more",),
    ),
    Mutant(
        "suggests_in_random_directions", "kinds", "lora_fx/application/suggestion.py",
        "        return True\n\n    def close", "        return False\n\n    def close",
        "Of a wide gradient what it does to random directions is taken for its own, without a second pass.",
        tests=("tests/test_suggest.py::test_a_wide_gradient_is_found_without_being_kept",),
    ),
    Mutant(
        "suggestion_keeps_the_gradients", "kinds", "lora_fx/application/suggestion.py",
        "            s.add(parameter.grad)\n        parameter.grad = None", "            s.add(parameter.grad)",
        "The gradients of all weights are there at once.",
        tests=("tests/test_suggest.py::test_no_more_than_one_gradient_is_there_at_a_time",),
    ),
    Mutant(
        "suggestion_steps_upwards", "kinds", "lora_fx/application/suggestion.py",
        "wide * (-rate / adapter.scale)", "wide * (rate / adapter.scale)",
        "The measured step goes up the gradient.",
        tests=("tests/test_suggest.py::test_a_measured_step_is_the_dense_one",),
    ),
    Mutant(
        "suggestion_of_the_whole_weight", "kinds", "lora_fx/application/suggestion.py",
        "if self.row.rows is not None:\n            G =", "if False:\n            G =",
        "The gradient of a part of a weight is that of the whole.",
        tests=("tests/test_suggest.py::test_the_step_is_what_was_predicted_to_first_order_site_by_site",),
    ),
    Mutant(
        "sweep_forgets_what_is_over", "paper", "lora_fx/paper/sweep.py",
        "{run.key: run for run in runs if run.key not in notes.found}", "{run.key: run for run in runs}",
        "A sweep that goes on trains everything again.",
        tests=("tests/test_sweep.py::test_an_interrupted_sweep_goes_on_where_it_was",),
    ),
    Mutant(
        "sweep_over_its_budget", "paper", "lora_fx/paper/sweep.py",
        "if self.cost[name] <= left]:", "if left > 0]:",
        "What is compared at one budget goes beyond it.",
        tests=("tests/test_sweep.py::test_what_is_compared_at_one_budget_has_it",),
    ),
    Mutant(
        "torn_note_is_read", "paper", "lora_fx/paper/sweep.py",
        'text.rpartition("\\n")[0]', "text",
        "A line that an interrupted write has left is read.",
        tests=("tests/test_sweep.py::test_an_interrupted_sweep_goes_on_where_it_was",),
    ),
    Mutant(
        "tied_counted_twice", "kinds", "lora_fx/application/trained.py",
        "    parameters = list(dict.fromkeys(model.parameters()))",
        "    parameters = [p for m in model.modules() for p in m._parameters.values() if p is not None]",
        "A summary counts what has two names twice.",
        tests=("tests/test_trained.py::test_a_summary_counts_each_parameter_once",),
    ),
    Mutant(
        "a_goes_as_fast_as_b", "kinds", "lora_fx/application/trained.py",
        'if name == "B"}', 'if name in "AB"}',
        "LoRA+ gives A the rate of B.",
        tests=("tests/test_trained.py::test_b_alone_goes_faster",),
    ),
    Mutant(
        "pruning_changes_the_scale", "kinds", "passes/prune.py",
        '"alpha": adapter.scale * divisor}', '"alpha": adapter.alpha}',
        "A pruned adapter divides its alpha by fewer ranks.",
        tests=("tests/test_budget.py::test_pruned_ranks_leave_the_forward_the_file_and_the_fold",),
    ),
    Mutant(
        "adalora_scale_of_what_is_left", "files", "export/adapters/peft.py",
        "    alpha, first = config[\"lora_alpha\"], config[\"init_r\"]\n",
        "    alpha, first = config[\"lora_alpha\"], config[\"target_r\"]\n",
        "An AdaLoRA of PEFT's is scaled by the rank that is left, and not by the one that its training began with.",
        tests=("tests/test_peft_adalora.py::test_we_read_what_peft_saves",),
    ),
    Mutant(
        "flags_of_a_block_stay", "switching", "passes/activate.py",
        "            parameter.requires_grad_(flag)\n", "            pass\n",
        "What a block has frozen or thawed stays so after it.",
        tests=("tests/test_active.py::test_what_was_frozen_or_thawed_inside_is_as_it_was",),
    ),
    Mutant(
        "zeros_are_proof", "verification", "lora_fx/checks/uses.py",
        "own if row.problem == _NOTHING and not own.problem else row",
        'replace(own, problem="") if row.problem == _NOTHING else row',
        "A use that multiplies zeros is certified without a measurement that shows it right.",
        tests=("tests/test_certificate.py::test_a_use_of_zeros_whose_branch_is_lost_is_not_certified",),
    ),
    # ── the paper: directions, subspaces, table 7, the command line ──────────────────────────────────────────────────
    Mutant(
        "phi_by_the_larger", "paper", "lora_fx/paper/subspaces.py",
        "overlap / torch.minimum(", "overlap / torch.maximum(",
        "φ(i, j) is divided by the larger of i and j, so that a subspace inside another is no 1.",
    ),
    Mutant(
        "random_overlap_by_the_smaller", "paper", "lora_fx/paper/subspaces.py",
        "return torch.maximum(i[:, None], j[None, :]) / d", "return torch.minimum(i[:, None], j[None, :]) / d",
        "Random subspaces are expected to overlap less than they do.",
    ),
    Mutant(
        "directions_of_the_core_transposed", "paper", "lora_fx/paper/factors.py",
        "(P @ vh.mT)[:, :n]", "(P @ vh)[:, :n]",
        "The right-singular directions are mixed by the transpose.",
    ),
    Mutant(
        "rounding_is_a_direction", "paper", "lora_fx/paper/factors.py",
        "n = int((s > s[0] * rounding).sum())", "n = len(s)",
        "Rows of zeros in A are directions of the adapter.",
    ),
    Mutant(
        "entropy_in_bits", "paper", "lora_fx/paper/factors.py",
        "(-share * share.log())", "(-share * share.log2())",
        "The effective rank is exp of an entropy in bits: n equal values count as more than n.",
    ),
    Mutant(
        "factors_of_a_file_lose_their_scale", "paper", "lora_fx/paper/factors.py",
        "scale = float(alphas[path]) / A.shape[0]", "scale = 1.0 / A.shape[0]",
        "The alpha of a file is not read.",
    ),
    Mutant(
        "parts_of_a_file_are_one", "paper", "lora_fx/paper/factors.py",
        "for entry in _entries(folder, name) or [_WHOLE]:", "for entry in [_WHOLE]:",
        "The query and the value of a fused weight are one adapter of twice the rank.",
    ),
    Mutant(
        "layers_in_no_order", "paper", "lora_fx/paper/factors.py",
        "sorted(pairs.items(), key=lambda pair: _in_order(pair[0]))", "reversed(sorted(pairs.items()))",
        "The layers of a file come in another order than the model's.",
    ),
    Mutant(
        "rank_above_the_weights", "paper", "lora_fx/paper/factors.py",
        "        if self.rank > min(out, inner):", "        if False:",
        "An adapter has more directions than its weight.",
    ),
    Mutant(
        "amplification_upside_down", "paper", "lora_fx/paper/amplification.py",
        "factor=norm / along,", "factor=along / norm,",
        "The amplification factor is its own inverse.",
    ),
    Mutant(
        "weakest_directions_of_w", "paper", "lora_fx/paper/amplification.py",
        "squares[-n:]", "squares[:n]",
        "The directions of W are those of its smallest singular values.",
    ),
    Mutant(
        "first_rows_of_the_base", "paper", "lora_fx/paper/base.py",
        "W.index_select(axis, torch.tensor(adapter.rows))", "W.narrow(axis, 0, len(adapter.rows))",
        "Every part of a fused weight is held against its query.",
    ),
    Mutant(
        "other_weights_compared", "paper", "lora_fx/paper/subspaces.py",
        "    matching(first, second)\n    found", "    found",
        "Adapters of different models are compared, or fail with a KeyError.",
    ),
    Mutant(
        "a_refusal_is_success", "paper", "lora_fx/cli/lazy.py",
        "context.exit(REFUSED)", "context.exit(0)",
        "A command that refuses ends with exit code 0.",
    ),
    Mutant(
        "help_waits_for_torch", "paper", "lora_fx/cli/lazy.py",
        "import click\n", "import click\nimport torch\n",
        "The help of the command line imports torch.",
        tests=("tests/test_demo.py::test_it_answers_without_torch",),
    ),
    Mutant(
        "counts_are_rounded_only", "paper", "lora_fx/paper/counts.py",
        "(ROUND_DOWN, ROUND_HALF_UP))", "(ROUND_HALF_UP, ROUND_HALF_UP))",
        "18.87 million is not the 18.8 that the paper cuts it to.",
        tests=("tests/test_paper_counts.py::test_digits_are_cut_or_rounded",),
    ),
    Mutant(
        "bottlenecks_without_biases", "paper", "lora_fx/deltas/rewrites.py",
        '{"down_bias": (space.rank,), "up_bias": (d,), **norm}', "norm",
        "Adapter layers have no biases, and their counts are below the paper's.",
        tests=("tests/test_paper_counts.py::test_other_methods_are_the_papers_formulas",),
    ),
    Mutant(
        "prefixes_in_one_layer", "paper", "lora_fx/paper/counts.py",
        "lambda tokens: layers * d * tokens", "lambda tokens: d * tokens",
        "Prefix-layer tuning has as few parameters as prefix-embedding tuning.",
        tests=("tests/test_paper_counts.py::test_other_methods_are_the_papers_formulas",),
    ),
    # ── memory, before anything runs ─────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "weights_are_activations", "memory", "lora_fx/checks/footprint.py",
        "        if storage_of(tensor) not in own:", "        if True:",
        "A weight that autograd keeps is counted twice: as a weight, and as an activation.",
        tests=(f"{MEMORY}::test_it_is_what_is_measured", f"{MEMORY}::test_gpt3_holds_what_the_paper_says_with_adapters",
               f"{MEMORY}::test_only_what_is_kept_is_counted"),
    ),
    Mutant(
        "adapters_are_weights", "memory", "lora_fx/checks/footprint.py",
        "for key, t in everything.items() if key not in adapters)", "for key, t in everything.items())",
        "Adapters are counted among the model's own weights too.",
    ),
    Mutant(
        "optimizer_has_no_state", "memory", "lora_fx/checks/footprint.py",
        "        made.step()\n", "",
        "The state of an optimizer is seen before its first step, when there is none.",
    ),
    Mutant(
        "training_sees_the_trace", "memory", "lora_fx/checks/footprint.py",
        "        with _untraced():\n", "        with nullcontext():\n",
        "transformers sees a trace, and keeps a mask and repeated keys that training has not.",
    ),
    Mutant(
        "memory_in_eval_mode", "memory", "lora_fx/checks/footprint.py",
        "        model.train()\n        yield", "        model.eval()\n        yield",
        "Masks of dropout are not counted.",
    ),
    Mutant(
        "memory_in_the_models_dtype", "memory", "lora_fx/checks/footprint.py",
        "return dtype if dtype is not None and", "return dtype if False and",
        "The dtype that is asked for is not taken.",
    ),
    # ── activation rewrites ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "bottleneck_without_the_residual", "rewrites", "lora_fx/deltas/rewrites.py",
        "return y + F.linear(z, up, theta.up_bias)",
        "return F.linear(z, up, theta.up_bias)",
        "What a bottleneck gives stands in the place of y.",
        tests=of_rewrites("a_linear_of_each_is_what_its_paper_says"),
    ),
    Mutant(
        "bottleneck_starts_at_random", "rewrites", "lora_fx/deltas/rewrites.py",
        "    theta.up.zero_()\n",
        "    theta.up.uniform_(-bound, bound)\n",
        "A fresh bottleneck is not the identity.",
        tests=of_rewrites("each_system_trains_by_rules_alone_and_exactly_its_own"),
    ),
    Mutant(
        "norm_of_a_bottleneck_untrained", "rewrites", "lora_fx/deltas/rewrites.py",
        "(use.space.out,), theta.norm_weight, theta.norm_bias)",
        "(use.space.out,))",
        "The LayerNorm of Adapter L has no weight and no bias.",
        tests=of_rewrites("a_linear_of_each_is_what_its_paper_says"),
    ),
    Mutant(
        "kronecker_the_other_way_round", "rewrites", "lora_fx/deltas/rewrites.py",
        '"iab,ipf,ifq->apbq"',
        '"iab,ipf,ifq->paqb"',
        "Of A ⊗ B a compacter makes B ⊗ A.",
        tests=of_rewrites("a_linear_of_each_is_what_its_paper_says"),
    ),
    Mutant(
        "last_word_is_a_token", "rewrites", "lora_fx/deltas/rewrites.py",
        "own = F.embedding((use.x - n).clamp",
        "own = F.embedding((use.x - n + 1).clamp",
        "Tokens are looked up one row too late.",
        tests=of_rewrites("tokens_stand_behind_the_last_one_of_the_table"),
    ),
    Mutant(
        "tokens_asked_of_the_table", "rewrites", "lora_fx/deltas/rewrites.py",
        "use.of(use.x.clamp(max=n - 1))",
        "use.of(use.x)",
        "The table is asked for rows that it does not have.",
        tests=of_rewrites("tokens_stand_behind_the_last_one_of_the_table"),
    ),
    Mutant(
        "tokens_start_as_noise", "rewrites", "lora_fx/deltas/rewrites.py",
        "theta.tokens.copy_(weight.index_select(-1, drawn).mT)",
        "theta.tokens.normal_()",
        "New tokens are no words that the model knows.",
        tests=of_rewrites("tokens_start_as_words_of_the_table"),
    ),
    Mutant(
        "rewrite_of_the_plain_use", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "plain = weight.only(deltas) if deltas else weight.base",
        "plain, deltas = weight.base, []",
        "The deltas of a weight are lost where something rewrites its use.",
        tests=of_rewrites("it_stands_around_the_deltas_and_a_later_one_around_an_earlier_one"),
    ),
    Mutant(
        "only_the_last_rewrite", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "use = partial(_around, own, use, theta)",
        "first = partial(_around, own, use, theta)\n    use = first",
        "Of several rewrites of one use the last alone is done.",
        tests=of_rewrites("it_stands_around_the_deltas_and_a_later_one_around_an_earlier_one"),
    ),
    Mutant(
        "rewrite_left_out_of_an_unknown_use", "rewrites", "lora_fx/deltas/adapted_weight.py",
        'raise _no_use(branch, "reads it in another way than a product does whose features come last")',
        "continue",
        "A use that no plan has seen goes on without its rewrite.",
        tests=of_rewrites("a_use_that_no_plan_has_seen_is_refused_when_it_runs"),
    ),
    Mutant(
        "rewrite_in_the_dtype_of_theta", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "theta = own.cast(weight.base.dtype).theta if weight.cast else own.theta",
        "theta = own.theta",
        "Beside a weight in bfloat16 a rewrite computes with float32.",
        tests=of_rewrites("beside_a_weight_in_bfloat16_its_theta_is_float32_and_its_result_is_not"),
    ),
    Mutant(
        "rewrite_of_channels", "rewrites", "lora_fx/deltas/adapted_weight.py",
        "if call.out_dims != (-1,):",
        "if False:",
        "A bottleneck behind a convolution narrows positions.",
        tests=of_rewrites("what_has_no_such_use_is_refused_by_name"),
    ),
    Mutant(
        "rewrite_before_the_bias", "rewrites", "passes/planning.py",
        'if bias is not None and use.call.options.get("bias") is None:',
        "if False:",
        "A bias that is added by an op of its own comes behind the bottleneck.",
        tests=of_rewrites("what_has_no_such_use_is_refused_by_name"),
    ),
    Mutant(
        "rewritten_and_read_besides", "rewrites", "passes/planning.py",
        "if use not in row.uses and not (row.split and use.module not in here):",
        "if False:",
        "Who reads the weight besides is told so when it runs.",
        tests=of_rewrites("what_has_no_such_use_is_refused_by_name"),
    ),
    Mutant(
        "rewrite_is_served_dense", "rewrites", "passes/insert.py",
        " and _has_delta(a) for a in alike", " for a in alike",
        "What rewrites a use is asked to be a sum, and the error names that.",
        tests=of_rewrites("code_that_wants_a_plain_tensor_is_told_that_no_product_was_seen"),
    ),
    Mutant(
        "shared_is_counted_at_each_site", "rewrites", "passes/planning.py",
        " - sum(sum(own.values()) for own in common) + sum(once.values())",
        "",
        "What adapters have in common is counted for each.",
        tests=of_rewrites("each_system_trains_by_rules_alone_and_exactly_its_own"),
    ),
    Mutant(
        "nothing_is_shared", "rewrites", "passes/insert.py",
        "        if owner is not adapter:\n            adapter.share(tensor, owner)\n",
        "",
        "Each compacter has factors of its own.",
        tests=of_rewrites("what_a_compacter_shares_has_one_owner"),
    ),
    Mutant(
        "shared_with_those_of_one_call", "rewrites", "passes/insert.py",
        "        if adapter.name == name:\n            for tensor in _in_common",
        "        if False:\n            for tensor in _in_common",
        "Sites that are added later share with each other alone.",
        tests=of_rewrites("what_a_compacter_shares_has_one_owner"),
    ),
    Mutant(
        "shared_starts_again", "rewrites", "lora_fx/deltas/adapter.py",
        "for name in self._owners:  # it has started",
        "for name in ():",
        "A later site draws what all have trained anew.",
        tests=of_rewrites("what_a_compacter_shares_has_one_owner"),
    ),
    Mutant(
        "shared_is_saved_nowhere", "rewrites", "export/adapters/own.py",
        "bases[h.adapter.owner(tensor)]",
        "bases[h.adapter]",
        "A file looks for what is shared at each site.",
        tests=of_rewrites("saved_copied_and_put_away_it_is_the_same"),
    ),
    Mutant(
        "rewrite_folds", "rewrites", "passes/fold.py",
        "if isinstance(adapter.kind, ActivationRewrite):",
        "if False:",
        "A fold leaves out what is no delta.",
        tests=of_rewrites("nothing_that_folds_takes_it"),
    ),
    Mutant(
        "tokens_are_checked_without_one", "rewrites", "lora_fx/checks/rewritten.py",
        "flat[given] = _mixed(flat[given], adapter)",
        "pass",
        "The self-check never looks a new token up.",
        tests=of_rewrites("a_certificate_has_a_row_for_each_use"),
    ),
    Mutant(
        "check_rewrites_nothing", "rewrites", "lora_fx/checks/rewritten.py",
        "use = partial(rewritten, adapter, use)",
        "pass",
        "A model is held against the one without its rewrites.",
        tests=of_rewrites("a_certificate_has_a_row_for_each_use"),
    ),
    Mutant(
        "loss_counts_tokens", "rewrites", "lora_fx/application/tokens.py",
        "row.all(_IGNORED, tensor)",
        "row.all(0, tensor)",
        "A loss asks for what new tokens stand for.",
        tests=of_rewrites("tokens_are_put_into_a_batch"),
    ),
    Mutant(
        "positions_behind_an_infix_before_it", "rewrites", "lora_fx/application/tokens.py",
        "self.prefix + self.infix * behind",
        "self.prefix + self.infix",
        "The prompt's positions leave room for the infix behind it.",
        tests=of_rewrites("tokens_are_put_into_a_batch"),
    ),
    Mutant(
        "infix_behind_padding", "rewrites", "lora_fx/application/tokens.py",
        "ends = torch.where(first < length, first, ends)",
        "ends = first",
        "In a row without labels the infix stands behind its padding.",
        tests=of_rewrites("tokens_are_put_into_a_batch"),
    ),
    # ── checkpoints on disk ──────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "strength_is_dropped", "checkpoints", "export/checkpoints/arithmetic.py",
        "scale=plain.scale * share.strength", "scale=plain.scale",
        "An adapter of strength 0.5 is folded whole.",
        tests=(f"{CHECKPOINTS}::test_strengths_multiply_deltas_and_several_adapters_add_up",),
    ),
    Mutant(
        "first_features_of_dora", "checkpoints", "export/checkpoints/arithmetic.py",
        "value.narrow(axis, start, size)", "value.narrow(axis, 0, size)",
        "Every block of rows gets the sizes of the first.",
        tests=(f"{CHECKPOINTS}::test_it_is_the_fold_of_the_model",),
    ),
    Mutant(
        "one_expert_for_all", "checkpoints", "export/checkpoints/arithmetic.py",
        "delta.picked(torch.tensor(n))", "delta.picked(torch.tensor(0))",
        "Every expert gets the adapter of the first.",
        tests=(f"{CHECKPOINTS}::test_experts_are_matrices_of_their_own",),
    ),
    Mutant(
        "what_was_written_is_trusted", "checkpoints", "export/checkpoints/streams.py",
        "if found != (was.target, was.beside_digest):", "if False:",
        "A file that a kill has left is gone on with, whatever is in it.",
        tests=(f"{CHECKPOINTS}::test_what_was_finished_is_verified_before_it_is_trusted",),
    ),
    Mutant(
        "another_base_is_gone_on_with", "checkpoints", "export/checkpoints/streams.py",
        "if self.read_digest.hexdigest() != was.source:", "if False:",
        "A base that has changed is gone on with.",
        tests=(f"{CHECKPOINTS}::test_another_task_or_another_base_does_not_go_on_with_it",),
    ),
    Mutant(
        "a_torn_line_counts", "checkpoints", "export/checkpoints/work.py",
        ".split(b\"\\n\")[:-1]  # what", ".split(b\"\\n\")  # what",
        "A line of the journal that a kill has cut short is read.",
        tests=(f"{CHECKPOINTS}::test_what_was_finished_is_verified_before_it_is_trusted",),
    ),
    Mutant(
        "another_task_goes_on", "checkpoints", "export/checkpoints/work.py",
        "elif first != self.task:", "elif False:",
        "A fold goes on with what another fold had begun.",
        tests=(f"{CHECKPOINTS}::test_another_task_or_another_base_does_not_go_on_with_it",),
    ),
    Mutant(
        "two_processes_at_once", "checkpoints", "export/checkpoints/work.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        "Two processes write the same folder.",
        tests=(f"{CHECKPOINTS}::test_two_at_once_is_one_too_many",),
    ),
    Mutant(
        "a_full_folder_is_written_over", "checkpoints", "export/checkpoints/work.py",
        "    if out.exists() or out.is_symlink():", "    if False:",
        "A folder with files in it is replaced.",
        tests=(f"{CHECKPOINTS}::test_a_folder_that_is_not_empty_is_not_written_to",),
    ),
    Mutant(
        "an_index_is_believed", "checkpoints", "export/checkpoints/checkpoint.py",
        "if where != table.get(name):", "if False:",
        "An index may say that a tensor is where it is not.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "an_index_leaves_its_folder", "checkpoints", "export/checkpoints/checkpoint.py",
        "if Path(name).name != name or name in", "if False and name in",
        "An index may name any file of the system.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "weights_a_second_time", "checkpoints", "export/checkpoints/checkpoint.py",
        "if any(fnmatch.fnmatch(name, pattern) for pattern in _COPIES):", "if False:",
        "The base's weights are copied beside the folded ones, for a loader to take.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "a_truncated_shard", "checkpoints", "export/checkpoints/checkpoint.py",
        "    if end != size:", "    if end < size:",
        "A shard may end before its tensors do.",
        tests=(f"{CHECKPOINTS}::test_a_damaged_base_is_refused",),
    ),
    Mutant(
        "a_tied_weight_is_folded", "checkpoints", "export/checkpoints/entries.py",
        "if twice or (vocabulary and tied is not False and len(names) < 2):", "if twice:",
        "An adapter of the embedding changes the head that is tied to it.",
        tests=(f"{CHECKPOINTS}::test_a_weight_that_may_be_tied_is_refused",),
    ),
    Mutant(
        "the_config_decides_on_squares", "checkpoints", "export/checkpoints/entries.py",
        "            if said != flag:", "            if False:",
        "A square matrix is folded as the config says, which knows only the last layer.",
        tests=(f"{CHECKPOINTS}::test_a_square_matrix_lies_as_its_neighbours_of_that_name",),
    ),
    Mutant(
        "convolutions_are_plain", "checkpoints", "export/checkpoints/entries.py",
        "if set(shape[2:]) != {1} and folder.header is None:", "if False:",
        "A dilated convolution is folded as a plain one.",
        tests=(f"{CHECKPOINTS}::test_an_adapter_that_does_not_fit_is_refused",),
    ),
    Mutant(
        "a_half_entry_is_dropped", "checkpoints", "export/checkpoints/entries.py",
        "if lost := sorted({*folder.tensors} - used):", "if lost := []:",
        "What fits nowhere in an adapter's file is dropped in silence.",
        tests=(f"{CHECKPOINTS}::test_an_adapter_that_does_not_fit_is_refused",),
    ),
    Mutant(
        "a_bias_tells_the_other_axis", "checkpoints", "export/checkpoints/orientation.py",
        "None if rows == columns else columns", "None if rows == columns else rows",
        "A bias is as long as there are input features.",
        tests=(f"{CHECKPOINTS}::test_a_square_matrix_lies_as_its_neighbours_of_that_name",),
    ),
    Mutant(
        "what_is_new_is_not_seen", "checkpoints", "export/checkpoints/manifest.py",
        '"is new": new}', '"is new": []}',
        "A file that somebody has put into a folded checkpoint is not named.",
        tests=(f"{CHECKPOINTS}::test_every_file_that_changes_is_named",),
    ),
    Mutant(
        "any_base_comes_back", "checkpoints", "export/checkpoints/fold.py",
        "if end.target != manifest.files[name].base:", "if False:",
        "What an unfold has written need not be the base.",
        tests=(f"{CHECKPOINTS}::test_nothing_is_unfolded_but_what_was_written",),
    ),
    Mutant(
        "directions_at_random", "checkpoints", "export/checkpoints/extract.py",
        "_ROUNDS = 4", "_ROUNDS = 0",
        "An extracted adapter holds the first directions that were drawn, and not the largest.",
        tests=(f"{CHECKPOINTS}::test_the_nearest_of_a_rank_is_kept",),
    ),
    Mutant(
        "conv1d_is_extracted_as_linear", "checkpoints", "export/checkpoints/extract.py",
        "flags = {pair.new: bool(orientation.transposed(pair.new)) for", "flags = {pair.new: False for",
        "The factors of a weight that lies (in, out) are in each other's place.",
        tests=(f"{CHECKPOINTS}::test_what_was_folded_is_extracted",),
    ),
    Mutant(
        "wrong_is_done", "command", "lora_fx/cli/lazy.py",
        "REFUSED, FAILED, INTERRUPTED = 2, 3, 130", "REFUSED, FAILED, INTERRUPTED = 2, 0, 130",
        "What is looked at and found wrong ends with 0.",
    ),
    Mutant(
        "a_path_with_a_sign", "command", "lora_fx/cli/checkpoints.py",
        "if not path or Path(text).exists():", "if not path:",
        "A folder that has a = in its name is taken for a strength.",
        tests=(f"{COMMAND}::test_a_strength_comes_after_the_last_sign",),
    ),
    Mutant(
        "a_glob_is_a_number", "command", "lora_fx/cli/given.py",
        "for kind in (int, float) if key in _NUMBERS else ():", "for kind in (int, float):",
        "where=0 on the command line is the number 0, which is no glob.",
        tests=(f"{COMMAND}::test_models_by_json",),
    ),
    Mutant(
        "help_imports_torch", "command", "lora_fx/cli/checkpoints.py",
        "from lora_fx.cli.lazy import FAILED\n", "import torch\nfrom lora_fx.cli.lazy import FAILED\n",
        "A command imports torch to print its help.",
        tests=(f"{COMMAND}::test_help_has_an_example_of_each_and_needs_no_torch",),
    ),
)  # fmt: skip
