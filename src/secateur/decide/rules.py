"""Which pruning rules are there? One table: the options of each, and the function that decides.

To add one: its function in `by_load.py`, and its row in `RuleOptions`. `Rule`, `LAEP`, the Trainer callback, the words
of `--prune`, `PretrainOptions` and the commands read the options from the table, with their types, ranges, help and
messages. Importing it loads no torch, so that `--help` stays quick.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar, cast, get_args, get_type_hints

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.decide.by_load import Allocation

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Which numbers an option accepts, and how messages say that."""

    accepts: Callable[[float], bool]
    expected: str


ABOVE_0 = Range(accepts=lambda value: value > 0, expected="a number above 0, or inf")
ABOVE_0_UP_TO_1 = Range(accepts=lambda value: 0 < value <= 1, expected="a number above 0 and at most 1")
AT_LEAST_1 = Range(accepts=lambda value: value >= 1, expected="a whole number of at least 1")
SHARE = Range(accepts=lambda value: 0 < value < 1, expected="a share above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says of an option, beside its name and type.

    Args:
        decides: the function of `by_load.py` that decides, called with a `Problem` and the options of its kind.
        kind: what the options are called that belong to one rule; left out, the option is the whole rule.
        off: with several options to a rule, the value that stands for one that was left out.
        help: one line, without a capital and without a full stop.
    """

    decides: str
    range: Range
    help: str
    kind: str | None = None
    off: float | None = None


class RuleOptions(TypedDict, total=False):
    """The options of all rules, a row each. Those of one kind go together; of the kinds, exactly one is given."""

    alpha: Annotated[
        float | None,
        Row(
            kind="thresholds",
            decides="laep",
            range=ABOVE_0,
            off=math.inf,
            help="an expert goes only if its load is at most this many times the layer's mean",
        ),
    ]
    beta: Annotated[
        float | None,
        Row(
            kind="thresholds",
            decides="laep",
            range=ABOVE_0_UP_TO_1,
            off=1.0,
            help="the least used experts go only while together they have less than this share of the load",
        ),
    ]
    target_params: Annotated[
        float | None,
        Row(
            decides="target_params",
            range=SHARE,
            help="keep at most this share of the model's parameters (of a model folder: of its bytes)",
        ),
    ]
    max_rerouted: Annotated[
        float | None,
        Row(decides="max_rerouted", range=SHARE, help="at most this share of the routed tokens loses its expert"),
    ]


# The rule of a training that names none.
DEFAULT_RULE: RuleOptions = {"target_params": 0.67}


@dataclass(frozen=True, kw_only=True)
class RuleOption:
    """An option of a rule: a row of the table with its name and type."""

    name: str
    type: type[int] | type[float]
    row: Row

    @property
    def kind(self) -> str:
        return self.row.kind or self.name

    @property
    def flag(self) -> str:
        """On the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def in_words(self) -> str:
        """In messages."""
        return f"{self.name} ({self.flag})"

    def parse(self, text: str) -> float:
        """The number that a text is; a ValueError for none."""
        try:
            return self.type(text)
        except ValueError:
            raise ValueError(f"{self.name} is {text!r}, expected {self.row.range.expected}") from None

    def check(self, value: object) -> None:
        """Raise SecateurError, naming the option, unless the value is a number of its type and in its range."""
        types = (int, float) if self.type is float else (int,)
        if isinstance(value, bool) or not isinstance(value, types) or not self.row.range.accepts(value):
            raise SecateurError(f"{self.in_words} is {value!r}, expected {self.row.range.expected}")


@dataclass(frozen=True, kw_only=True)
class RuleKind:
    """One way to decide: the options that belong to it and the function."""

    name: str
    options: tuple[RuleOption, ...]

    @property
    def function(self) -> Callable[..., Allocation]:
        """(Problem, *, its options by name) -> Allocation."""
        from secateur.decide import by_load

        function: Callable[..., Allocation] = getattr(by_load, self.options[0].row.decides)
        return function

    def values(self, given: Mapping[str, float]) -> dict[str, float]:
        """What the function takes: the options that were given, and what stands for the others."""
        return {option.name: given.get(option.name, cast(float, option.row.off)) for option in self.options}


def _option(name: str, hint: Any) -> RuleOption:
    typed, row = get_args(hint)
    (number,) = (one for one in get_args(typed) if one is not type(None))
    return RuleOption(name=name, type=number, row=row)


OPTIONS: dict[str, RuleOption] = {
    name: _option(name, hint) for name, hint in get_type_hints(RuleOptions, include_extras=True).items()
}
RULES: dict[str, RuleKind] = {
    kind: RuleKind(name=kind, options=tuple(option for option in OPTIONS.values() if option.kind == kind))
    for kind in dict.fromkeys(option.kind for option in OPTIONS.values())
}


def given(options: RuleOptions) -> RuleOptions:
    """The options that are not None."""
    return cast(RuleOptions, {name: value for name, value in options.items() if value is not None})


def kind_of(options: Mapping[str, float]) -> RuleKind:
    """The kind of rule that the given options make.

    Raises:
        SecateurError: none or several; the message has what was found, and all there are.
    """
    kinds = dict.fromkeys(option.kind for name, option in OPTIONS.items() if name in options)
    if len(kinds) != 1:
        found = " with ".join(option.in_words for name, option in OPTIONS.items() if name in options)
        raise SecateurError(
            f"pruning rule: found {found or 'no option'}, expected exactly one of: "
            f"{', '.join(_in_words(kind, lambda option: option.in_words) for kind in RULES.values())}"
        )
    return RULES[next(iter(kinds))]


def flags_in_words() -> str:
    """All kinds by their flags: "thresholds (--alpha, --beta or both), --target-params or --max-rerouted"."""
    *kinds, last = (_in_words(kind, lambda option: option.flag) for kind in RULES.values())
    return f"{', '.join(kinds)} or {last}"


def _in_words(kind: RuleKind, name: Callable[[RuleOption], str]) -> str:
    names = ", ".join(map(name, kind.options))
    if kind.name in OPTIONS:
        return names
    return f"{kind.name} ({names} or {'both' if len(kind.options) == 2 else 'several'})"


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does for any function, where a name is not that of an option."""
    for name in options.keys() - OPTIONS.keys():
        raise TypeError(f"got an unexpected keyword argument {name!r}")


def spelled_out(
    function: F, *, hint: Callable[[RuleOption], Any] = lambda option: option.type | None, after: str | None = None
) -> F:
    """Show the options one by one in the signature of a function that takes them as `**rule: Unpack[RuleOptions]`.

    `help`, notebooks and typer read the signature; type checkers read the annotation.

    Args:
        hint: the annotation of an option. after: the parameter that they follow; left out: all others.
    """
    signature = inspect.signature(function)
    shown = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    place = len(shown) if after is None else [one.name for one in shown].index(after) + 1
    kind = inspect.Parameter.KEYWORD_ONLY if after is None else shown[place - 1].kind
    shown[place:place] = [
        inspect.Parameter(name, kind, default=None, annotation=hint(option)) for name, option in OPTIONS.items()
    ]
    cast(Any, function).__signature__ = signature.replace(parameters=shown)
    return function


def with_options_listed(cls: C) -> C:
    """List the options in the docstring of a class, as the last of its arguments."""
    off = {name: f" Left out: {option.row.off:g}, off." for name, option in OPTIONS.items() if option.row.off}
    lines = [
        f"        {name}: {option.row.help}; {option.row.range.expected}.{off.get(name, '')}\n"
        for name, option in OPTIONS.items()
    ]
    if cls.__doc__:  # python -OO has none
        cls.__doc__ = cls.__doc__.replace("\n    Raises:\n", f"{''.join(lines)}\n    Raises:\n", 1)
    return cls


if TYPE_CHECKING:

    class RuleFields(Any):  # type: ignore[misc]
        """Type checkers know the options from `RuleOptions`."""

else:
    RuleFields = make_dataclass(
        "RuleFields",
        [(name, option.type | None, None) for name, option in OPTIONS.items()],
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__, "__doc__": "The options of all rules as fields, None where not given."},
    )
