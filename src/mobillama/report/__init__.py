"""Reports: what a run's records say, drawn for people."""
