"""Writes files whole or not at all, and reads JSON strictly.

Imports nothing of this library.
"""
