"""What there is to know of a model: its wrappers, its precision, its fingerprints, and whether it can be trained.

Imports `distributed` and `zo`.
"""
