"""The collectives of a run's processes, and parameters that are sharded over them.

Imports nothing of this library.
"""
