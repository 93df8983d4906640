"""Supervised fine-tuning on conversations, in the training loop."""
