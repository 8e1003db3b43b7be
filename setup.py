"""Puts the recipes, which are beside the package in the repository, into the package where it is installed."""

from setuptools import find_packages, setup


setup(
    packages=[*find_packages(include=["hf_dpzo*"]), "hf_dpzo.recipes"],
    package_dir={"hf_dpzo.recipes": "recipes"},
)
