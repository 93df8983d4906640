"""Records: hashes, manifests and locks, on which every proof of the project stands. Knows nothing above itself."""
