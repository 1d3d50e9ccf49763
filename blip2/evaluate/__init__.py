"""Evaluation: published protocols, the official scores, and a page of the worst items.

Nothing is imported here: `evaluate.names` gives a command's help the names of the tasks without loading torch.
"""
