"""`ZOTrainingArguments`, checked field by field.

Imports `privacy`, `zo`, `methods` and `data`.
"""
