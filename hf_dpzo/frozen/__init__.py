"""Work that no probe point changes: found out, done once, and shared.

Imports `data`, `models` and `losses`.
"""
