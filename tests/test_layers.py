"""The layers: a package imports only from packages above it in the table, and only the libraries beside its name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_dpzo


ROOT = Path(hf_dpzo.__file__).parent
# From the bottom, with the heavy libraries that each may import.
PACKAGES = {
    "io": {"jsonschema"},
    "distributed": {"torch", "numba", "triton"},
    "privacy": {"opendp", "dp_accounting", "scipy", "torch"},
    "plots": {"matplotlib"},
    "zo": {"torch", "numba", "triton"},
    "methods": set(),
    "data": {"torch", "datasets", "transformers"},
    "models": {"torch", "transformers", "peft", "accelerate", "huggingface_hub", "safetensors"},
    "losses": {"torch", "transformers"},
    "frozen": {"torch", "transformers", "psutil"},
    "step": {"torch"},
    "isolation": {"torch", "transformers", "datasets"},
    "trajectory": {"torch", "transformers", "peft", "safetensors", "filelock", "huggingface_hub"},
    "auditing": {"torch", "scipy"},
    "card": {"torch", "transformers", "huggingface_hub", "jsonschema"},
    "data_ledger": {"torch", "datasets", "transformers", "psutil"},
    "verification": {"torch", "transformers", "peft", "scipy", "safetensors", "huggingface_hub"},
    "arguments": {"transformers"},
    "trainer": {"torch", "transformers", "peft", "huggingface_hub", "datasets"},
    "trl": {"trl"},
    "recipe": {"torch", "transformers", "peft", "datasets"},
    "use": {"torch", "transformers", "peft", "datasets", "safetensors"},
    "cli": {"huggingface_hub"},
}
FACES = ("__init__", "__main__", "_requirements", "_version")
HEAVY = set().union(*PACKAGES.values())
# Beyond the order: secret and public randomness never meet, and accounting never meets the drawing of noise.
STRANGERS = [("privacy", "zo"), ("zo", "privacy"), ("privacy.accounting", "privacy.noise")]
# Calls that build a private generator, or only look at the global one.
OWN = ("np.random.Philox", "np.random.Generator", "np.random.get_state", "np.random.set_state", "np.random.default_rng")
SHARED_GENERATOR = {
    *("torch.manual_seed", "torch.randn", "torch.rand", "torch.normal", "torch.randint", "random.seed", "set_seed"),
}


def module_name(path: Path) -> str:
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


def package(module: str) -> str:
    return module.split(".")[0]


def imports_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
MODULES = [name for name in TREES if name and package(name) not in FACES]
IMPORTS = {name: set(imports_of(tree)) for name, tree in TREES.items()}


def internal_imports(module: str) -> set[str]:
    """Return the modules of this library that a module imports."""
    return {imported.removeprefix("hf_dpzo.") for imported in IMPORTS[module] if imported.startswith("hf_dpzo.")}


def test_every_package_has_a_layer():
    assert {package(name) for name in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_only_from_above_it(name):
    below = [*PACKAGES][[*PACKAGES].index(name) + 1 :]
    for module in (candidate for candidate in MODULES if package(candidate) == name):
        assert not {package(imported) for imported in internal_imports(module)} & set(below), module


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_only_its_own_heavy_libraries(name):
    for module in (candidate for candidate in MODULES if package(candidate) == name):
        assert {package(imported) for imported in IMPORTS[module]} & HEAVY <= PACKAGES[name], module


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_packages_that_must_stay_apart_do_not_import_each_other(one, other):
    assert {name for name in MODULES if name.startswith(one)}
    for module in (name for name in MODULES if name.startswith(one)):
        assert not {name for name in internal_imports(module) if f"{name}.".startswith(f"{other}.")}, module


def test_a_package_states_its_purpose_and_its_imports_in_two_lines():
    for name in set(PACKAGES) - {"plots", "methods", "cli"}:
        purpose, _, imported = ast.get_docstring(TREES[name]).partition("\n\n")
        assert purpose and imported.startswith("Imports ") and "\n" not in purpose + imported, name


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name):
    assert TREES[name].body[-1].end_lineno <= 300


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_a_screen(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "refuse_given_arguments"):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 50, node.name


@pytest.mark.parametrize("name", MODULES)
def test_no_global_generator_is_seeded_or_drawn_from(name):
    """Directions have generators of their own, and noise comes from the operating system."""
    called = {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}
    assert not called & SHARED_GENERATOR
    assert not {call for call in called if call.startswith("np.random.") and not call.startswith(OWN)}
    assert "random" not in IMPORTS[name] or name == "data.sealed"
