"""Checks the versions of the libraries that are installed, in one sentence where they do not fit."""

from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement


def check_requirements(package: str = "hf_dpzo") -> None:
    """Raise `ImportError` if a library that `package` needs is installed in a version that it was not tested with.

    A library that is missing is named by the import that fails. A checkout that was never installed has no list.

    >>> check_requirements()
    """
    try:
        listed = metadata.requires(package) or ()
    except metadata.PackageNotFoundError:
        return
    check_versions(listed)


def check_versions(listed: Sequence[str]) -> None:
    """Raise `ImportError` if what is installed does not meet a requirement that is `listed`.

    >>> check_versions(["packaging>=1"])
    >>> check_versions(["packaging<1"])
    Traceback (most recent call last):
    ...
    ImportError: packaging...: hf_dpzo needs packaging<1; pip install 'packaging<1'.
    """
    for requirement in map(Requirement, listed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            raise ImportError(
                f"{requirement.name}=={version}: hf_dpzo needs {requirement}; pip install '{requirement}'."
            )
