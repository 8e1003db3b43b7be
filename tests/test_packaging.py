"""Built archives are complete: the wheel holds what the library reads, and the sdist what the tests read."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_dpzo

from support.paths import ROOT


LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "out", "outputs")
BUILD = "from setuptools import build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sources, and in `dist` what is built from them."""
    folder = tmp_path_factory.mktemp("build") / "hf_dpzo"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, timeout=300, capture_output=True)
    return folder


def sources(folder: Path, *parts: str) -> set[str]:
    """Return the files below some parts of the sources."""
    paths = {path.relative_to(folder) for part in parts for path in (folder / part).rglob("*")}
    return {path.as_posix() for path in paths if (folder / path).is_file()}


def test_the_wheel_holds_the_package_and_all_files_that_it_reads(built):
    (wheel,) = (built / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_dpzo/")}
    recipes = {f"hf_dpzo/{name}" for name in sources(built, "recipes") if name.endswith(".yaml")}
    assert held == sources(built, "hf_dpzo") | recipes
    assert {"hf_dpzo/py.typed", "hf_dpzo/templates/model_card.md", "hf_dpzo/methods/README.md"} < held


def test_the_sdist_holds_all_files_that_its_tests_read(built):
    (archive,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    wanted = sources(built, "hf_dpzo", "tests", "docs", "recipes", "benchmarks", "model_cards")
    wanted |= {path.name for path in built.iterdir() if path.suffix in (".md", ".txt", ".cff", ".toml", ".cfg", ".py")}
    assert wanted <= held
    assert {"CITATION.cff", "LICENSE", "SECURITY.md", "tests/conftest.py"} < held


def test_the_citation_names_the_current_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == hf_dpzo.__version__
