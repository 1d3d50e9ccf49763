"""Evaluation: published protocols, the official scores, and what was got wrong, to look through."""
