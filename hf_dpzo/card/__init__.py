"""What a model promises: the statement, the card, and their publication.

Imports everything from `io` to `trajectory`.
"""
