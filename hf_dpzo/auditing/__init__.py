"""Attacks on the mechanism of a run and on the run itself, and what random directions alone give away.

Imports everything from `io` to `trajectory`.
"""
