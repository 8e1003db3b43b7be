"""The log of a run: writing it, reading it, replaying it, and resuming from it.

Imports everything from `io` to `step`.
"""
