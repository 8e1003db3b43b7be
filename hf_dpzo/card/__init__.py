"""The promise of a model: its statement, its card, and the publication of both.

Imports everything from `io` to `trajectory`.
"""
