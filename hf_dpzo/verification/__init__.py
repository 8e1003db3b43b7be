"""Checks what a published model claims against its log, its base model and its weights.

Imports everything from `io` to `card`.
"""
