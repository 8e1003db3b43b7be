"""Uses a trained model: loads it, asks it, evaluates it, merges its adapter, and exports it.

Imports everything from `io` to `recipe`.
"""
