"""What a recipe may say, and how a recipe and overrides become one checked configuration."""

from bitswitch.config.reading import load_recipe, recipe_names, to_yaml
from bitswitch.config.schema import EnginePart, PretrainPart, QuantizedPart, Recipe, SearchPart

__all__ = [
    "EnginePart",
    "PretrainPart",
    "QuantizedPart",
    "Recipe",
    "SearchPart",
    "load_recipe",
    "recipe_names",
    "to_yaml",
]
