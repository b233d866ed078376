"""`edgekiln recipes` and `edgekiln version`: what this installation knows, without a server."""

from __future__ import annotations

from importlib import metadata

from service.commands import options
from service.commands.output import print_json, print_table
from service.recipes import DEVICES, ENGINES, FORMATS, RECIPES

RECIPES_EPILOG = """Example:

\b
  edgekiln recipes --json
"""


def recipes(as_json: options.AsJson = False) -> None:
    """List what a job may ask for."""
    if as_json:
        documents = [
            {"name": recipe.name, "description": recipe.description, "is_lossy": recipe.is_lossy}
            for recipe in RECIPES.values()
        ]
        print_json({"recipes": documents, "formats": list(FORMATS), "engines": list(ENGINES), "devices": list(DEVICES)})
        return
    print_table(("recipe", "what it does"), [[recipe.name, recipe.description] for recipe in RECIPES.values()])
    print(f"formats: {', '.join(FORMATS)}\nengines: {', '.join(ENGINES)}\ndevices: {', '.join(DEVICES)}")


def version() -> None:
    """Print the version."""
    try:
        print(metadata.version("edgekiln"))
    except metadata.PackageNotFoundError:
        print("not installed as a package")
