"""The one config system: a YAML recipe, dotted overrides, presets as defaults, and the plain data of what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from mobillama.errors import UsageError, did_you_mean
from mobillama.recipe import PRESETS, PretrainRecipe, preset_defaults

Recipe = TypeVar("Recipe")

_MAY_BE_ABSENT = ("model.num_key_value_heads", "model.head_dim")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 is a number and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def recipe_parser(recipe: type[Any], prog: str) -> ArgumentParser:
    """Return the parser whose options are the recipe's fields, with their docstrings as help."""
    usage = f"{prog} RECIPE.yaml [--key value …]"
    parser = ArgumentParser(prog=prog, usage=usage, exit_on_error=False, add_help=False)
    parser.add_class_arguments(recipe)
    return parser


def load_recipe(recipe: type[Recipe], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply ``--dotted.key value`` overrides, and return the typed, checked recipe.

    ``model.preset``, in the file or as an override, gives the model's defaults; other ``model`` keys change it.

    Raises:
        UsageError: the file is missing or no YAML mapping, a key is unknown (the nearest one is named), a value has
            the wrong type or does not fit the others.
    """
    settings = read_mapping(path)
    for key, value in parse_overrides(overrides):
        _set_dotted(settings, key, value)
    parser = recipe_parser(recipe, "mobillama")
    known = sorted(action.dest for action in parser._actions)
    try:
        if recipe is PretrainRecipe:
            known.append("model.preset")
            _apply_preset(parser, settings)
        for key in _dotted_keys(settings, known):
            if key not in known:
                raise UsageError(f"unknown key '{key}'{did_you_mean(key, known)}")
        for key, value in flatten(settings).items():
            if value is None and key not in _MAY_BE_ABSENT:
                raise UsageError(f"{key}: has no value; give one or remove the key")
        return recipe(**parser.instantiate(parser.parse_object(settings)).as_dict())
    except ArgumentError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Return ``(dotted key, YAML value)`` for each ``--key value`` or ``--key=value``.

    Raises:
        UsageError: a word is not of that form.
    """
    words = list(overrides)
    pairs: list[tuple[str, Any]] = []
    while words:
        word = words.pop(0)
        key, equals, text = word.partition("=")
        if not key.startswith("--"):
            raise UsageError(f"'{word}': overrides are written --dotted.key value")
        if not equals:
            if not words:
                raise UsageError(f"{key}: its value is missing; write {key} VALUE")
            text = words.pop(0)
        try:
            pairs.append((key.removeprefix("--"), yaml.load(text, Loader=_RecipeLoader)))  # noqa: S506 a SafeLoader
        except yaml.YAMLError:
            raise UsageError(f"{key}: '{text}' is not a value that YAML can read") from None
    return pairs


def resolved(recipe: Any) -> dict[str, Any]:
    """Return the recipe as plain data: what is saved, compared, and hashed into every checkpoint's state."""
    return asdict(recipe)


def to_yaml(recipe: Any) -> str:
    """Return the resolved recipe as YAML, in the order of its fields."""
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as ``{"dotted.key": value}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UsageError: it is missing, unreadable, or holds something else.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)  # noqa: S506 a SafeLoader
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe; the folder recipes/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values")
    return settings


def _set_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = settings.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"--{key}: '{parent}' has the value {child!r} and no keys of its own")
        settings = child
    settings[leaf] = value


def _apply_preset(parser: ArgumentParser, settings: dict[str, Any]) -> None:
    """Make ``model.preset`` (and drop it from the settings) the parser's defaults of ``model``."""
    model = settings.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    name = model.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"model.preset: unknown preset '{name}'{did_you_mean(str(name), PRESETS)}")
    parser.set_defaults({f"model.{key}": value for key, value in preset_defaults(name).items()})


def _dotted_keys(settings: dict[str, Any], known: Sequence[str], prefix: str = "") -> list[str]:
    """Return the dotted keys written in ``settings``, entering only sections that the parser knows as sections."""
    keys = []
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        is_section = any(name.startswith(f"{dotted}.") and name != f"{dotted}.help" for name in known)
        if is_section and isinstance(value, dict):
            keys += _dotted_keys(value, known, f"{dotted}.")
        elif is_section:
            raise UsageError(f"'{dotted}' is a section; write its keys below it, indented")
        else:
            keys.append(dotted)
    return keys
