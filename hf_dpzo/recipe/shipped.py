"""The recipes that come with the library."""

from pathlib import Path

import hf_dpzo
from hf_dpzo.recipe.written import find_suffix


# How tables end. Recipes may also be JSON, which is YAML too, and editors save either as .txt.
TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".parquet", ".arrow", ".xls", ".xlsx", ".ods")


def find_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with the library, by name.

    >>> "quickstart" in find_recipes()
    True
    """
    package = Path(hf_dpzo.__file__).parent
    # Installed, they are within the package; in a checkout of the repository they are beside it.
    folder = next((place for place in (package / "recipes", package.parent / "recipes") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of the recipe `name`.

    Raises:
        ValueError: there is no such recipe; the message lists those there are.
    """
    recipes = find_recipes()
    if name not in recipes:
        raise ValueError(f"recipe={name}: no recipe of that name comes with the library; take {', '.join(recipes)}.")
    return recipes[name]


def locate_recipe(path: str | Path) -> Path:
    """Return the file of a recipe; a word that is no file is the name of one that comes with the library.

    Raises:
        ValueError: there is no such file, or no recipe of that name.
    """
    path = Path(path)
    if not path.exists() and len(path.parts) == 1 and not path.suffix:
        path = find_recipe(path.name)
    if path.is_dir():
        raise ValueError(f"recipe={path}: it is a folder; name the YAML file of a recipe, in it or elsewhere.")
    if not path.is_file():
        raise ValueError(f"recipe={path}: there is no such file ({path.absolute()}); name the YAML file of a recipe.")
    if find_suffix(path) in TABLE_SUFFIXES:
        raise ValueError(
            f"recipe={path}: a table ends like that, and no recipe; name the YAML file of the recipe, which names the "
            "table as data."
        )
    return path
