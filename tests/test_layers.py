"""The layers: a module imports only from modules above it, and only the libraries of its own business."""

import ast
from pathlib import Path

import pytest

import hf_dpzo


PACKAGE = Path(hf_dpzo.__file__).parent

# In order: each module may import those above it, and of the heavy libraries those named beside it.
LAYERS = {
    "_version": set(),
    "sealed": {"torch"},
    "noise": {"opendp"},
    "queries": {"dp_accounting"},
    "accounting": {"dp_accounting"},
    "meaning": set(),
    "calibration": {"dp_accounting", "scipy"},
    "ledger": set(),
    "tradeoff": set(),
    "kernel": {"numba"},
    "stream": {"torch"},
    "mask": {"torch"},
    "sharded": {"torch"},
    "perturbation": {"torch"},
    "processes": {"torch"},
    "lattice": {"torch"},
    "mechanism": {"torch"},
    "units": {"torch", "datasets"},
    "sampling": {"torch"},
    "shares": {"torch", "datasets", "transformers"},
    "turns": {"torch"},
    "collation": {"torch"},
    "estimator": {"torch"},
    "constraints": {"torch"},
    "updates": {"torch"},
    "optimizer": {"torch"},
    "pruning": {"torch"},
    "methods.method": set(),
    "methods.mezo": set(),
    "methods.dpzero": set(),
    "methods.dpzo": set(),
    "methods.aggzo": set(),
    "methods.zoso": set(),
    "methods.zopo": set(),
    "methods.projected": set(),
    "methods": set(),
    "descent": {"torch"},
    "inherent": {"torch"},
    "audit": {"torch", "scipy"},
    "pictures": {"matplotlib"},
    "roc": set(),
    "packages": set(),
    "commits": {"huggingface_hub"},
    "strict_json": {"jsonschema"},
    "header": set(),
    "records": set(),
    "trajectory": {"filelock"},
    "output_layer": {"torch", "transformers", "peft"},
    "losses": {"torch", "transformers", "peft"},
    "lockstep": {"torch", "transformers"},
    "together": {"torch"},
    "evaluation": {"torch"},
    "precision": {"torch", "transformers"},
    "made_up": {"torch", "transformers", "datasets"},
    "isolation": {"torch", "transformers"},
    "adapters": {"peft"},
    "initial": {"torch", "transformers", "peft", "safetensors"},
    "probing": {"torch"},
    "untrusted": {"torch", "transformers", "peft"},
    "replay": {"torch", "transformers", "peft", "huggingface_hub"},
    "checkpoints": {"transformers"},
    "run_log": {"torch", "filelock"},
    "prompting": {"torch", "transformers", "peft"},
    "row_refusals": {"torch"},
    "refusals": {"torch", "transformers", "peft"},
    "values": set(),
    "method_flags": {"transformers"},
    "unit_flags": {"transformers"},
    "privacy_flags": {"transformers"},
    "training_args": {"transformers"},
    "guard": {"torch", "transformers", "accelerate"},
    "progress": {"transformers"},
    "schema": {"jsonschema"},
    "planned": set(),
    "declared": set(),
    "statement": set(),
    "sources": {"huggingface_hub"},
    "weights": {"torch", "safetensors"},
    "training_picture": set(),
    "front_matter": {"huggingface_hub"},
    "model_card": {"huggingface_hub"},
    "publishing": {"huggingface_hub"},
    "log_repository": {"torch"},
    "finding": set(),
    "replayed": {"torch"},
    "verification": {"huggingface_hub", "scipy"},
    "discreet": {"torch", "transformers"},
    "durable": {"torch", "transformers"},
    "published": {"huggingface_hub", "transformers", "peft"},
    "search": {"transformers"},
    "trainer": {"torch", "transformers", "peft"},
    "recipe": {"transformers"},
    "loading": {"torch", "transformers", "peft", "datasets"},
    "running": {"transformers"},
    "commands": set(),
    "commands.outcome": set(),
    "commands.tables": set(),
    "commands.train": set(),
    "commands.replay": set(),
    "commands.curves": set(),
    "commands.planning": set(),
    "commands.audit": set(),
    "commands.card": set(),
    "commands.verify": set(),
    "commands.push_log": {"huggingface_hub"},
    "cli": set(),
    "__main__": set(),
    "": set(),
}
# Generators of one's own, and a look at the global one.
OWN = ("np.random.Philox", "np.random.Generator", "np.random.get_state", "np.random.set_state", "np.random.default_rng")
HEAVY = {
    *("opendp", "dp_accounting", "scipy", "torch", "transformers", "accelerate", "peft", "datasets"),
    *("huggingface_hub", "safetensors", "filelock", "jsonschema", "matplotlib", "numba"),
}
# Beyond the order: what would let secrets and public randomness, or privacy and models, meet.
FORBIDDEN = {
    "noise": {"perturbation"},
    "perturbation": {"noise", "mechanism", "accounting", "ledger"},
    "estimator": {"noise", "mechanism", "accounting", "ledger"},
    "optimizer": {"noise", "mechanism", "accounting", "ledger"},
    "mechanism": {"perturbation", "estimator"},
    "accounting": {"noise"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def inner(imported: str) -> str | None:
    return imported.removeprefix("hf_dpzo").removeprefix(".") if imported.split(".")[0] == "hf_dpzo" else None


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def test_every_module_has_a_layer():
    assert set(FILES) == set(LAYERS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_module_imports_only_from_above(name):
    order = list(LAYERS)
    inside = {inner(imported) for imported in imports_of(FILES[name])} - {None}
    if name == "":
        return  # The package's own file names what users import.
    assert all(order.index(other) < order.index(name) for other in inside), inside
    assert not inside & FORBIDDEN.get(name, set())


@pytest.mark.parametrize("name", sorted(FILES))
def test_module_imports_no_foreign_library(name):
    outside = {imported.split(".")[0] for imported in imports_of(FILES[name])} & HEAVY
    assert outside <= LAYERS[name]


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 320


@pytest.mark.parametrize("name", sorted(FILES))
def test_functions_fit_a_screen(name):
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "refuse_arguments"):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 50, node.name


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_global_generator_is_seeded_or_drawn_from(name):
    """Directions own their generators, and noise comes from the operating system."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    drawn = {
        "torch.manual_seed",
        "torch.randn",
        "torch.rand",
        "torch.normal",
        "torch.randint",
        "random.seed",
        "set_seed",
    }
    assert not called & drawn
    assert not {call for call in called if call.startswith("np.random.") and not call.startswith(OWN)}
    assert "random" not in imports_of(FILES[name]) or name == "sealed"
