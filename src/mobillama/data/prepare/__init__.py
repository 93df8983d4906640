"""Preparation, in restartable stages of tasks: read and tokenise, find duplicates, pack, deal to chunks."""
