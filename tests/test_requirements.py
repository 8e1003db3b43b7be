"""Versions that the library was not tested with are named when it is imported."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from hf_dpzo._requirements import check_requirements, check_versions


def write_package(folder, version):
    """Write what pip leaves of an installed transformers."""
    info = folder / f"transformers-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_another_version_stops_the_import_with_one_sentence(tmp_path, version):
    write_package(tmp_path, version)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "import hf_dpzo"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: transformers=={version}: hf_dpzo needs transformers")
    assert "pip install 'transformers" in done.stderr


def test_what_is_installed_here_fits():
    check_requirements()


def test_extras_and_other_systems_are_not_asked_for():
    check_versions(["packaging<1; extra == 'test'", "packaging<1; sys_platform == 'none'", "no-such-library>=9"])


def test_development_versions_count_as_what_they_lead_to():
    check_versions([f"packaging>={metadata.version('packaging')}.dev0"])


def test_a_package_that_is_not_installed_has_no_list():
    check_requirements("no-such-library")
