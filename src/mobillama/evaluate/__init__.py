"""Evaluation: what a model is worth, beside what simpler methods reach on the same bytes."""
