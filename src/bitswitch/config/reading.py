"""How a recipe and overrides become one checked configuration."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bitswitch.config.mistakes import first_mistake
from bitswitch.config.schema import Recipe
from bitswitch.errors import UserError, nearest

# Of a recipe: the largest of ours have a hundred.
_MOST_VALUES = 10_000


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("bitswitch.recipes").iterdir() if ".yaml" in p.name
    )


def load_recipe(recipe: str, overrides: Sequence[str] = (), *, seed: int | None = None) -> Recipe:
    """A checked configuration.

    Args:
        recipe: a built-in recipe's name, or the path of a YAML file; its key `extends` names another that it is laid over.
        overrides: "key.of.part=value"; the value is read as YAML.
        seed: in place of the recipe's.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, or a value that does not fit.
    """
    value = _read(recipe)
    for override in overrides:
        _override(value, override)
    if seed is not None:
        value["seed"] = seed
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise UserError(f"recipe {recipe}: {first_mistake(error, value)}") from error


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _read(recipe: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            hint = nearest(recipe, recipe_names())
            raise UserError(
                f"no recipe is named {recipe!r}{hint}; there are: {', '.join(recipe_names())}, or a .yaml file"
            )
        text = resources.files("bitswitch.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"recipe {recipe} cannot be read: {reason}") from error
    value = _yaml(text, f"recipe {recipe}")
    if not isinstance(value, dict):
        raise UserError(f"recipe {recipe} is not a mapping of keys to values")
    parent = value.pop("extends", None)
    if parent is None:
        return value
    if not isinstance(parent, str) or recipe in above:
        raise UserError(f"recipe {recipe}: extends={parent!r} does not name another recipe that ends the chain")
    if path.suffix and Path(parent).suffix:
        parent = str(path.parent / parent)
    return _laid_over(_read(parent, (*above, recipe)), value)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; everything else of `above` replaces that of `below`."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML without what nobody means: a key said twice, of which the last would count, and numbers to base 60 or 8.

    1:30 is text here, not 90, and 010 is refused, not 8. As in YAML 1.2, 1e-3 is a number, not text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, since what a merge key brings in comes later.
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key[1]!r} is there twice", node.start_mark
                )
        return node

    def number_or_text(self, node: yaml.ScalarNode) -> Any:
        """What has a colon is text."""
        if ":" in node.value:
            return node.value
        if node.tag.endswith("int") and re.fullmatch(r"[-+]?0[0-9_]*[1-9][0-9_]*", node.value):
            told = f"{node.value} would be an octal number: write it without the leading 0, or in quotes"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that it would take for a number is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
for _number in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_number}", _Loader.number_or_text)


def _yaml(text: str, where: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
        if _size(value, {}) > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        return value
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The latter from values of a type that YAML knows, such as a date that there is not.
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values a value is, written out; what anchors repeat is counted once for each time and looked at once.

    Raises:
        ValueError: it holds itself.
    """
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(one, known) for one in inside)
    if known[id(value)] < 0:
        raise ValueError("a value holds itself")
    return known[id(value)]


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, such as train.epochs=30")
    *parents, last = key.split(".")
    for parent in parents:
        # A part that is left out is null where a recipe was printed.
        inner = value.get(parent)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {parent!r} has no keys inside")
        # A copy: through an anchor of YAML, another part may be the same mapping.
        value[parent] = value = dict(inner)
    value[last] = _yaml(text, f"the value of {key}")
    if " #" in text and "#" not in str(value[last]):
        raise UserError(
            f"override {override!r}: YAML takes what follows ' #' for a comment: quote the value, {key}=\"'...'\""
        )
