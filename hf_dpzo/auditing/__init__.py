"""Attacks the mechanism of a run, and shows what random directions alone would give away.

Imports everything from `privacy` to `step`.
"""
