"""The ledger of a data set: what all runs on the same rows may release, composed, and a report of it.

Imports everything from `io` to `card`.
"""
