"""Zeroth-order optimization: public directions, probe points, updates. It knows nothing of noise or accounting.

Imports `distributed`, and never `privacy`.
"""
