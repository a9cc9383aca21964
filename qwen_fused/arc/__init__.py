"""Everything that knows what an ARC task is: files, episodes, symmetry, features, sampling."""
