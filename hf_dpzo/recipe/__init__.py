"""A run as a YAML file: read, loaded, run.

Imports everything from `io` to `trainer`.
"""
