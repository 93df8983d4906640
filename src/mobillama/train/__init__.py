"""Pre-training: the loop, its optimizer, its checkpoints and its validation."""
