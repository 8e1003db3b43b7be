"""Facts about a model: its wrappers, precision, fingerprints and seeds, and whether it can be trained.

Imports `distributed` and `zo`.
"""
