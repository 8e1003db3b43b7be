"""Reads a run from a YAML file, loads what it names, and runs it.

Imports everything from `io` to `trainer`.
"""
