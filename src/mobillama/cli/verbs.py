"""What all verbs share: how one is added, the help of recipes, the exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = (
    "exit codes: 0 done · 2 wrong use or config · 3 verification failed · 4 data corrupt · 5 diverged · "
    "75 stopped, run me again to resume · 130/143 killed by the user"
)


def add_verb(
    verbs: Verbs,
    name: str,
    perform: Callable[[argparse.Namespace], None],
    summary: str,
    recipe: Callable[[], type[Any]] | None = None,
) -> argparse.ArgumentParser:
    """Add a verb that calls ``perform``.

    Args:
        verbs: the group to add to.
        name: of the verb.
        perform: called with the parsed options; the words it does not know are in ``overrides``.
        summary: what it does, as a clause.
        recipe: returns the recipe's class where the verb takes one; its keys become options.
    """
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXIT_CODES,
        allow_abbrev=False,
        add_help=recipe is None,
    )
    if recipe is not None:
        verb.add_argument("-h", "--help", action=_RecipeHelp, recipe=recipe)
    verb.set_defaults(perform=perform, takes_overrides=recipe is not None, verb=verb)
    return verb


def add_group(verbs: Verbs, name: str, summary: str) -> Verbs:
    """Add a verb that has verbs of its own."""
    parser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)


def options_of(verb: argparse.ArgumentParser) -> list[str]:
    """Return the long options of a verb."""
    return [option for action in verb._actions for option in action.option_strings if option.startswith("--")]


def new_path(text: str) -> Path:
    """Return the path of something to make; argparse tells the user of one without a name (empty, ``.``, ``/``)."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"'{text}' is no name for a new file or directory")
    return Path(text)


def new_file(text: str) -> Path:
    """Return the path of a file to make in a directory that is there, or argparse tells the user before work begins."""
    if not new_path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent}: no such directory; make it first")
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``least`` on."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} on")
        return int(text)

    return read


class _RecipeHelp(argparse.Action):
    """``--help`` of a verb with a recipe: the verb's own options, then every key of the recipe."""

    def __init__(self, option_strings: Sequence[str], dest: str, recipe: Callable[[], type[Any]]) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this help and every key of the recipe")
        self.recipe = recipe

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from mobillama.config import recipe_help
        from mobillama.recipe import PRESETS, PretrainRecipe

        recipe = self.recipe()
        parser.print_help()
        print("\nKeys of the recipe; each can be overridden as --key value:\n")
        print(recipe_help(recipe, parser.prog))
        if recipe is PretrainRecipe:
            print(f"model.preset is one of: {', '.join(PRESETS)}")
        parser.exit()
