"""The log of a run: written, read, replayed, resumed.

Imports everything from `io` to `step`.
"""
