"""Training: recipes, stages, the loop."""

from kedge.training.config import Recipe
from kedge.training.progress import PlainProgress, Progress, TerminalProgress, progress_for
from kedge.training.recipe import load_recipe, parse_recipe, validate_recipe

__all__ = [
    "PlainProgress",
    "Progress",
    "Recipe",
    "TerminalProgress",
    "load_recipe",
    "parse_recipe",
    "progress_for",
    "validate_recipe",
]
