"""A command line from a dataclass: its fields make the parser and the help, and each answer to a mistake is one line.

A flag is a field: its name, its type, and in `flag` its group, default, help, other spellings and the rule for its value.

    lr: float = flag("training", 1e-3, "learning rate after warm-up", "--learning-rate", rule="above 0")

An underscore does for a dash in any flag.
"""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import Field, field, fields
from functools import partial
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

RULES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: 0 < x < math.inf,
    "0 or more": lambda x: 0 <= x < math.inf,
    "2 or more, the megabytes of a page": lambda x: 2 <= x < math.inf,
    "a probability, 0 <= p < 1": lambda x: 0 <= x < 1,
    "a power of two, 2 or more": lambda x: x >= 2 and x & (x - 1) == 0,
}


def flag(
    group: str,
    default: object,
    text: str,
    *aliases: str,
    rule: str | None = None,
    choices: list[str] | None = None,
    free: bool = False,
) -> Field:
    """A field of Options, and all that the parser must know of it."""
    return field(
        default=default,
        metadata={
            "group": group,
            "text": text,
            "aliases": aliases,
            "rule": rule,
            "choices": choices,
            "free": free,
        },
    )


def spelling(name: str) -> str:
    """The flag of a field: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """One that answers with one line."""

    def error(self, message: str) -> NoReturn:
        of_the_first = (
            os.environ.get("RANK", "0") == "0"
        )  # of several processes, which all find it out
        self.exit(2, f"train.py: {message}\n" if of_the_first else "")


def value(kind: type, rule: str | None, text: str) -> int | float | str | Path:
    """A flag's value from its text. Raises: ArgumentTypeError saying what it must be."""
    noun = {int: "a whole number", float: "a number"}.get(kind, "text")
    try:
        number = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be {noun}{f', {rule}' if rule else ''}; got {text!r}"
        ) from None
    if rule and not RULES[rule](number):
        raise argparse.ArgumentTypeError(f"must be {rule}; got {text}")
    return number


def parser_of(options: type, description: str | None) -> Parser:
    """A parser with a flag for each field of the dataclass, in its groups."""
    parser = Parser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    titles = dict.fromkeys(each.metadata["group"] for each in fields(options))
    groups, types = (
        {title: parser.add_argument_group(title) for title in titles},
        get_type_hints(options),
    )
    for each in fields(options):
        its, kind = (
            each.metadata,
            (get_args(types[each.name]) or (types[each.name],))[0],
        )  # of `int | None`, int
        if kind is bool:
            more = {"action": "store_true"}
        else:
            shown = None if its["choices"] else {int: "N", float: "X", Path: "FOLDER"}.get(kind)
            more = {
                "type": partial(value, kind, its["rule"]),
                "choices": its["choices"],
                "metavar": shown,
            }
        default = (
            "" if each.default is None or each.default is False else f" (default: {each.default})"
        )
        groups[its["group"]].add_argument(
            spelling(each.name),
            *its["aliases"],
            default=each.default,
            help=its["text"] + default,
            **more,
        )
    return parser


def read(parser: Parser, words: list[str] | None) -> argparse.Namespace:
    """The values that a command line gives; sys.argv's if it is None. Exits with one line and status 2 for an unknown flag."""
    words = [
        word.replace("_", "-", word.partition("=")[0].count("_")) if word.startswith("--") else word
        for word in (sys.argv[1:] if words is None else words)
    ]
    args, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0], [name for action in parser._actions for name in action.option_strings]
        )
        parser.error(
            f"{unknown[0]} is no flag: "
            + (f"did you mean {near[0]}?" if near else "--help shows all of them")
        )
    return args
