"""Deployment: exports for other tools, each checked against the model it came from."""
