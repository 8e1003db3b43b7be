"""From a data set to the micro-batches of a Poisson batch, under seal.

Imports `distributed` and `privacy`.
"""
