"""The options of the pruning rules on the command line: one for each row of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from secateur.decide.rules import DEFAULT_RULE, RuleOption, spelled_out

Command = TypeVar("Command", bound=Callable[..., Any])


def with_rule_options(
    *, after: str, help: Callable[[RuleOption], str], panel: str | None = None
) -> Callable[[Command], Command]:
    """Give a command that takes `**rule` an option for each of the table, behind the parameter `after` in its help.

    What was typed, or None, is in its `rule` by name.
    """

    def hint(option: RuleOption) -> Any:
        shown = typer.Option(option.flag, help=help(option), rich_help_panel=panel)
        return Annotated[option.type | None, shown]

    def decorate(command: Command) -> Command:
        command.__annotations__ = get_type_hints(command, include_extras=True)  # typer evaluates those of no signature
        return spelled_out(command, hint=hint, after=after)

    return decorate


def help_for_folders(option: RuleOption) -> str:
    """For the commands where the rules are those of criterion laep."""
    return f"laep: {option.row.help}."


def help_for_training(option: RuleOption) -> str:
    """For the command where one rule is the default."""
    default = DEFAULT_RULE.get(option.name)
    text = f"{option.row.help[0].upper()}{option.row.help[1:]}."
    return text if default is None else f"{text} {default} when no rule is given."
