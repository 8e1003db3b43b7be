"""One loss for each example, for each kind of head.

Imports `models`.
"""
