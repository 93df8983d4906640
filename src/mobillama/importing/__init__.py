"""Models from elsewhere: read, checked, stored once. Imports no transformers."""
