"""One step: its public half, its secret half, and the fast forms of both.

Imports everything from `distributed` to `frozen`.
"""
