"""Data: raw documents to tokenised sequences in a proven order, and from there to batches."""
