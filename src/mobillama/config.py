"""The one config system: a YAML recipe, dotted overrides, presets as defaults, and the plain data of what came out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from mobillama.errors import UsageError, did_you_mean
from mobillama.recipe import PRESETS, PretrainRecipe, preset_defaults

Recipe = TypeVar("Recipe")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 is a number and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: key '{key}' stands twice")
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
    settings = _unshared(read_mapping(path))
    for key, value in parse_overrides(overrides):
        _set_dotted(settings, key, value)
    parser = recipe_parser(recipe, "mobillama")
    try:
        if recipe is PretrainRecipe:
            _apply_preset(parser, settings)
        _check(recipe, settings, "", _known_keys(recipe))
        return recipe(**parser.instantiate(parser.parse_object(settings)).as_dict())
    except ArgumentError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def recipe_help(recipe: type[Any], prog: str) -> str:
    """Return the help on every key of a recipe, those of its nested sections of many included."""
    text = recipe_parser(recipe, prog).format_help()
    for name, kind in get_type_hints(recipe).items():
        if get_origin(kind) is dict:
            nested = recipe_parser(get_args(kind)[1], prog).format_help()
            text += f"\nEach of {name}, as --{name}.NAME.key value:\n" + nested.split("\n", 2)[2]
    return re.sub(r"\n +--[\w.]+(\.help .*| CONFIG +Path to a configuration file\.)", "", text)


def _known_keys(kind: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a recipe, sections included; ``*`` stands for a name that the user chooses."""
    if get_origin(kind) is dict:
        return _known_keys(get_args(kind)[1], f"{prefix}*.")
    if not is_dataclass(kind):
        return []
    keys = []
    for name, inner in get_type_hints(kind).items():
        keys += [f"{prefix}{name}", *_known_keys(inner, f"{prefix}{name}.")]
    return keys


def _check(kind: Any, value: Any, key: str, known: list[str]) -> None:
    """Raise a UsageError that names the key if ``value`` does not fit the type ``kind`` of a recipe's field."""
    if get_origin(kind) is Union:
        if value is not None:
            _check(get_args(kind)[0], value, key, known)
        return
    if value is None:
        raise UsageError(f"{key}: has no value; give one or remove the key")
    if is_dataclass(kind) or get_origin(kind) is dict:
        _check_section(kind, value, key, known)
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{key}: {value!r} is none of {', '.join(map(str, get_args(kind)))}")
    else:
        accepted = {float: (int, float)}.get(kind, (kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text (in quotes)"}[kind]
            raise UsageError(f"{key}: {value!r} is not {wanted}")


def _check_section(kind: Any, value: Any, key: str, known: list[str]) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"'{key}' is a section; write its keys below it, indented")
    hints = get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(value, get_args(kind)[1])
    for name, inner in value.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise UsageError(f"unknown key '{dotted}'{_suggestion(str(name), key, list(hints), known)}")
        _check(hints[name], inner, dotted, known)
    for name in [field.name for field in fields(kind) if _is_required(field)] if is_dataclass(kind) else []:
        if name not in value:
            raise UsageError(f"{f'{key}.' if key else ''}{name}: is missing; give it a value")


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _suggestion(name: str, section: str, siblings: list[str], known: list[str]) -> str:
    """Return what was probably meant: a key of the same section, the same key in another one, or all there are."""
    siblings += ["preset"] if section == "model" else []
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    near = [f"{section}.{key}" if section else key for key in near]
    near = near or [key for key in known if key.rsplit(".", 1)[-1] == name and "*" not in key]
    return f" (did you mean '{near[0]}'?)" if near else f"; known here: {', '.join(siblings)}"


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


def _unshared(value: Any) -> Any:
    """Copy nested settings so that an override of one place changes no other that YAML made the same by an alias."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


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
