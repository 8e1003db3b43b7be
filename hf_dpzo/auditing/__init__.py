"""Attacks on the mechanism of a run, and a demonstration of what random directions alone give away.

Imports everything from `privacy` to `step`.
"""
