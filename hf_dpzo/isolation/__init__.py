"""Measures on public rows whether the loss of one row depends on its neighbours.

Imports everything from `distributed` to `step`.
"""
