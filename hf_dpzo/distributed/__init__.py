"""What the processes of a run tell each other, and parameters that are split over them.

Imports nothing of this library.
"""
