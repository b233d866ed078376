"""`edgekiln recipes` and `edgekiln version`: what this installation knows, without a server."""

from __future__ import annotations

from importlib import metadata

from service.commands import options
from service.commands.output import print_json, print_table
from service.recipes import DEVICES, ENGINES, FORMATS, RECIPES, describe_recipes

RECIPES_EPILOG = """Example:

\b
  edgekiln recipes --json
"""


def recipes(as_json: options.AsJson = False) -> None:
    """List what a job may ask for."""
    if as_json:
        names = {"formats": list(FORMATS), "engines": list(ENGINES), "devices": list(DEVICES)}
        print_json({"recipes": describe_recipes(), **names})
        return
    rows = [[recipe.name, recipe.description, recipe.constraint or "-"] for recipe in RECIPES.values()]
    print_table(("recipe", "what it does", "what it needs"), rows)
    print("Every recipe runs from each engine in each format; recipes of your own: docs/recipes.md.")
    print(f"formats: {', '.join(FORMATS)}\nengines: {', '.join(ENGINES)}\ndevices: {', '.join(DEVICES)}")


def version() -> None:
    """Print the version."""
    try:
        print(metadata.version("edgekiln"))
    except metadata.PackageNotFoundError:
        print("not installed as a package")
