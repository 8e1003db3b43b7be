"""Secret noise, clipping, the one door, accounting and planning. Knows no model and no direction.

Imports `distributed`, and never `zo`.
"""
