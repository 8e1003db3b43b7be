"""The recipes that come with the library."""

from pathlib import Path

import hf_dpzo


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
    if not path.is_file():
        raise ValueError(f"recipe={path}: no such file.")
    return path
