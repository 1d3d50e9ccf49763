"""Tensor files of every kind, read strictly and without running anything in them, and written. Knows no model."""
