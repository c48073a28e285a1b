"""Rules: which sites, and what they get. The first rule that matches a site decides; one without a rank excludes.

Rule(role="attention.query | attention.value", rank=8, alpha=16)
Rule(where="*.mlp.*", layers="4-11", rank=4, kind="dora")
Rule(where="*", kind="bias")
Rule(pattern=lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), rank=4)
Rule(where="lm_head")                                                    # leave it alone
"""

from __future__ import annotations

import difflib
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

import numpy

from lora_fx.analysis.sites import UNKNOWN, Site
from lora_fx.analysis.words import refuse_words
from lora_fx.deltas.kinds import kind_named
from lora_fx.deltas.schedules import AUTO, SCHEDULES
from lora_fx.errors import KindError, RuleError
from lora_fx.reading import boundary, contents

INITS = ("kaiming", "gaussian", "zero")
SCALINGS = ("standard", "rslora")
#: of what PEFT calls an init, and what is a kind here
_KINDS_BY_START = {
    "pissa": "say kind='pissa'; for pissa_niter_4 also settings={'niter': 4}",
    "olora": "say kind='olora'",
}
SETTINGS = ("rank", "alpha", "dropout", "init", "scaling", "schedule")
REFUSE, SKIP = "refuse", "skip"

_BYTES = 2**20  # of a file of rules: tomllib takes seconds for each
_LARGEST = float(numpy.finfo(numpy.float32).max)
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


@dataclass(frozen=True, eq=False)
class Rule:
    """Keys (all that are given must match) and settings.

    Args:
        where: glob over the weight's and its modules' names, several with ``|``.
        role: glob over roles, several with ``|``; selects parts of fused weights and uses of tied ones.
        form: glob over forms (``linear``, ``matmul``, ``conv*`` …), several with ``|``.
        layers: layer indices: ``"0-3, 7"``, a range or integers; the first integer in the weight's name counts.
        pattern: a plain function of ordinary torch calls; its weights are the arguments that it multiplies with.
        adapt: which of the pattern's weights, several with ``|``; all by default.
        when: a predicate on the `Site`.
        kind: what an adapter is (see `lora_fx.deltas.kinds`): ``lora`` where there is a rank, ``dora``, ``adalora``,
            ``pissa``, ``olora``, ``bias``, ``full``, one that does not fold (``bottleneck``, ``compacter``,
            ``tokens``, ``prefix_layer``), or one that `register_kind` knows. Each takes the settings below that it has.
        rank: of the low-rank branch; without one, and without a kind, the rule excludes the sites.
        alpha: the scale is alpha / rank; alpha = rank by default.
        dropout: probability on the branch input, in training.
        init: ``kaiming`` (A as in `nn.Linear`, B = 0), ``gaussian`` (A normal with std 1/rank, B = 0), ``zero``
            (A and B zero, for loading), or a function ``(A, B) -> None`` that fills both in place.
        scaling: ``standard``, or ``rslora``: alpha / sqrt(rank).
        schedule: in which order the branches are computed: ``auto``, ``branch``, ``in_place``, ``fused`` or ``dense``
            (see `lora_fx.deltas.schedules`); all are the same function.
        settings: what else its kind can be given, by name.
        expect: how many sites the rule must decide.
        otherwise: what happens to sites that it decides and that cannot be adapted: ``refuse`` the plan, or ``skip``
            them. The plan's notes list what was left out; a rule that leaves out everything refuses.
        op: the old word for `form`; it goes with the next version.
    """

    where: str | None = None
    role: str | None = None
    form: str | None = None
    layers: str | int | Sequence[int] | None = None
    pattern: Callable[..., Any] | None = None
    adapt: str | None = None
    when: Callable[[Site], bool] | None = None
    kind: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    init: str | Callable[..., None] = "kaiming"
    scaling: str = "standard"
    schedule: str = AUTO
    settings: Mapping[str, Any] | None = None
    expect: int | None = None
    otherwise: str = REFUSE
    op: InitVar[str | None] = None

    def __post_init__(self, op: str | None) -> None:
        if op is not None and self.form is not None:
            raise self._error(f"form={self.form!r} and op={op!r} are both given", "op is the old word: leave it out")
        if op is not None:
            warnings.warn("Rule(op=…) is the old word for Rule(form=…)", DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "form", op)
        self._check_keys()
        if not self.excludes:
            self._check_kind()
            self._check_settings()

    def _check_keys(self) -> None:
        for key in ("where", "role", "form", "adapt"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not all(_globs(value))):
                remedy = "write a glob such as '*.mlp.*', several joined by ' | '"
                raise self._error(f"{key}={value!r} is no glob", remedy)
        if all(getattr(self, key) is None for key in ("where", "role", "form", "layers", "pattern", "when")):
            raise self._error("the rule has no key", "say which sites: where, role, form, layers, pattern or when")
        if self.otherwise not in (REFUSE, SKIP):
            raise self._error(f"otherwise={self.otherwise!r} is unknown", f"one of {REFUSE}, {SKIP}")
        if self.adapt is not None and self.pattern is None:
            raise self._error(f"adapt={self.adapt!r} without a pattern", "adapt names arguments of pattern")
        for key in ("when", "pattern"):
            if (value := getattr(self, key)) is not None and not callable(value):
                raise self._error(f"{key}={value!r} is no function", f"pass a function as {key}: no file can hold one")
        if self.expect is not None and not _is_whole(self.expect):
            raise self._error(f"expect={self.expect!r} is no number of sites", "give how many sites it must decide")
        self.layer_ranges  # noqa: B018  (parses, and raises)

    def _check_kind(self) -> None:
        if self.kind is not None and not isinstance(self.kind, str):
            raise self._error(f"kind={self.kind!r} is no name", "give the name of a kind, such as 'dora'")
        if self.settings is not None and not isinstance(self.settings, Mapping):
            raise self._error(f"settings={self.settings!r} is no table", "give settings={name: value}")
        try:
            kind_named("lora" if self.kind is None else self.kind).complete(self.chosen)
        except KindError as error:
            raise self._error(error.reason, error.remedy) from error

    def _check_settings(self) -> None:
        for key in ("alpha", "dropout"):
            value = getattr(self, key)
            if value is not None and not _is_number(value):
                raise self._error(f"{key}={value!r} is no number", f"give a number as {key}")
        if self.rank is not None and not (_is_whole(self.rank) and self.rank > 0):
            raise self._error(f"rank={self.rank!r} is no positive integer", "give rank=8, or leave it out to exclude")
        if self.alpha is not None and not abs(self.alpha) <= _LARGEST:
            raise self._error(f"alpha={self.alpha!r} is not finite in float32", "give an alpha that float32 holds")
        if not 0 <= self.dropout < 1:
            raise self._error(f"dropout={self.dropout!r} is no probability below 1", "give 0 <= dropout < 1")
        for key, words in (("scaling", SCALINGS), ("schedule", SCHEDULES), ("init", INITS)):
            value = getattr(self, key)
            if value not in words and not (key == "init" and callable(value)):
                also = ", or a function (A, B) -> None" if key == "init" else ""
                remedy = _KINDS_BY_START.get(str(value).partition("_niter_")[0], f"one of {', '.join(words)}{also}")
                raise self._error(f"{key}={value!r} is unknown", remedy)

    def _error(self, reason: str, remedy: str) -> RuleError:
        return RuleError(reason, place=self.label, remedy=remedy)

    @property
    def excludes(self) -> bool:
        """The sites that it decides stay as they are."""
        return self.kind is None and self.rank is None

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings that are not the default: what an adapter of its kind is made with."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name in SETTINGS}
        return {name: own for name, (own, default) in values.items() if own != default} | dict(self.settings or {})

    @property
    def label(self) -> str:
        """The rule as it was written: its keys and the settings that are not the default."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        shown = (f"{key}={getattr(value, '__name__', None) or repr(value)}" for key, value in given.items())
        return f"Rule({', '.join(shown)})"

    def __repr__(self) -> str:
        return self.label

    @property
    def layer_ranges(self) -> tuple[Sequence[int], ...]:
        """The numbers of the layers that it takes."""
        error = self._error(f"layers={self.layers!r} is no list of layers", "write '0-3, 7', a range or integers")
        if self.layers is None or isinstance(self.layers, range):
            return (self.layers,) if self.layers is not None else ()
        if not isinstance(self.layers, str):
            own = (self.layers,) if isinstance(self.layers, int) else self.layers
            if not isinstance(own, Iterable) or not all(map(_is_whole, own)):
                raise error
            return (own,)
        found = [_RANGE.fullmatch(part.strip()) for part in self.layers.split(",")]
        if not all(found):
            raise error
        return tuple(range(int(m[1]), int(m[2] or m[1]) + 1) for m in found if m)

    def _in_layers(self, layer: int | None) -> bool:
        return layer is not None and any(layer in numbers for numbers in self.layer_ranges)

    def matches(self, site: Site, in_pattern: frozenset[int] | None = None) -> bool:
        """Whether every key matches. `in_pattern` holds the ids of the weights that the pattern found."""
        return (
            (self.where is None or any(_any_glob(self.where, name) for name in site.names))
            and (self.role is None or _any_glob(self.role, site.role))
            and (self.form is None or any(_any_glob(self.form, use.form) for use in site.uses))
            and (self.layers is None or self._in_layers(site.layer))
            and (in_pattern is None or id(site.weight) in in_pattern)
            and (self.when is None or bool(self.when(site)))
        )


def _answering(init: Callable[..., None]) -> Callable[..., None]:
    """The words of other libraries are answered with ours."""
    known = [f.name for f in fields(Rule)]

    @wraps(init)
    def answered(self: Rule, *arguments: Any, **named: Any) -> None:
        refuse_words({k: v for k, v in named.items() if k not in (*known, "op")}, "Rule", _near(named, known))
        init(self, *arguments, **named)

    return answered


setattr(Rule, "__init__", _answering(Rule.__init__))  # noqa: B010  (mypy forbids the plain way)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _globs(text: str) -> list[str]:
    return [glob.strip() for glob in text.split("|")]


def _any_glob(text: str, name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in _globs(text))


def read_rules(rules: Any) -> tuple[Rule, ...]:
    """Rules from a `Rule`, a dict of its arguments, a sequence of those, or a TOML file with ``[[rule]]`` tables."""
    if isinstance(rules, Rule):
        return (rules,)
    if isinstance(rules, str | Path):
        return _from_toml(Path(rules))
    if isinstance(rules, Mapping):
        return _from_tables(rules["rule"], "rules") if set(rules) == {"rule"} else (_from_dict(rules),)
    if hasattr(rules, "peft_type"):
        raise _no_rules(f"{type(rules).__name__} among rules", "rules", "pass it by itself, in the place of all rules")
    if not isinstance(rules, Iterable):
        raise _no_rules(f"{rules!r} is no rule", "rules", "pass Rule objects, dicts or the path of a TOML file")
    found = tuple(rule for item in rules for rule in read_rules(item))
    if not found:
        raise _no_rules("there is no rule", "rules", "pass at least one Rule")
    return found


def _no_rules(reason: str, place: str | Path, remedy: str) -> RuleError:
    return RuleError(reason, place=str(place), remedy=remedy)


def _from_dict(given: Mapping[str, Any]) -> Rule:
    known = [f.name for f in fields(Rule)]
    for key in given:
        if key not in (*known, "op"):
            refuse_words({str(key): given[key]}, f"rule {dict(given)!r}", _near([str(key)], known))
    return Rule(**given)


def _near(words: Iterable[str], known: Sequence[str]) -> str:
    """What may have been meant by the first of them that is not known."""
    word = next((word for word in words if word not in (*known, "op")), "")
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"


def _from_toml(path: Path) -> tuple[Rule, ...]:
    with boundary("", str(path), "pass the path of a TOML file", RuleError):
        text = contents(path, "pass the path of a TOML file", _BYTES)
    with boundary("is no TOML", str(path), "write [[rule]] tables", RuleError):
        data = tomllib.loads(text.decode("utf-8"))
    if set(data) != {"rule"}:
        raise _no_rules(f"has the tables {sorted(data)}", path, "write one [[rule]] table for each rule")
    with boundary("its rules are none", str(path), "write [[rule]] tables", RuleError):
        return _from_tables(data["rule"], str(path))


def _from_tables(tables: Any, place: str) -> tuple[Rule, ...]:
    if not isinstance(tables, list | tuple) or not all(isinstance(own, Mapping) for own in tables):
        raise _no_rules(f"rule = {tables!r} is no list of tables", place, "write one [[rule]] table for each rule")
    return tuple(map(_from_dict, tables))


def select(
    rules: Sequence[Rule], sites: Sequence[Site], found: Mapping[Rule, frozenset[int]], seen: bool
) -> dict[Site, Rule]:
    """The rule that decides each site.

    Args:
        found: for each rule with a pattern, the ids of the weights it matched.
        seen: whether the sites come from a captured graph.

    Raises:
        RuleError: a rule decides no site, or not as many as it expects, or needs a graph that is not there.
    """
    chosen: dict[Site, Rule] = {}
    for rule in rules:
        if not seen and (rule.role is not None or rule.pattern is not None):
            raise rule._error(
                "roles and patterns are read from the graph, and there are no example inputs to capture one",
                "pass example_inputs, or select by where, form or layers",
            )
        matched = [site for site in sites if rule.matches(site, found.get(rule))]
        taken = [site for site in matched if site in chosen]
        decided = [site for site in matched if site not in chosen]
        if not decided or rule.expect not in (None, len(decided)):
            raise _miss(rule, decided, taken, sites)
        chosen.update(dict.fromkeys(decided, rule))
    return chosen


def _miss(rule: Rule, decided: list[Site], taken: list[Site], sites: Sequence[Site]) -> RuleError:
    count = f"matches {len(decided)} sites" if decided else "matches nothing"
    reason = count if rule.expect is None else f"{count}, and expect={rule.expect}"
    if taken:
        reason += f" ({len(taken)} more are decided by earlier rules)"
    if decided:
        return rule._error(reason, f"it matches {_listing(decided)}")
    if not sites:
        return rule._error(
            f"{reason}: there is no weight in it that multiplies or is looked up in", "pass a model with such a weight"
        )
    return rule._error(reason, f"the nearest of {len(sites)} sites: {_listing(_nearest(rule, sites))}")


def _nearest(rule: Rule, sites: Sequence[Site]) -> list[Site]:
    wanted = [glob.strip("*. ") for key in (rule.where, rule.role) if key for glob in _globs(key)]

    def distance(site: Site) -> float:
        texts = (*site.names, *(name.rpartition(".")[2] for name in site.names), site.role)
        return max((difflib.SequenceMatcher(None, w, t).ratio() for w in wanted for t in texts), default=0.0)

    return sorted(sites, key=distance, reverse=True)[:5]


def _listing(sites: Sequence[Site]) -> str:
    shown = [f"{site.weight.name} ({site.role if site.role != UNKNOWN else 'role unknown'})" for site in sites[:6]]
    return ", ".join(shown) + (f", … {len(sites) - 6} more" if len(sites) > 6 else "")
