"""Zeroth-order optimization: public directions, probe points, updates. Knows no noise and no accounting.

Imports `distributed`, and never `privacy`.
"""
