"""`ZOTrainingArguments`, checked field by field.

Imports `privacy`, `zo`, `methods`, `data` and `frozen`.
"""
