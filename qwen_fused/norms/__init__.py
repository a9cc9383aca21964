"""Gradient norms and clipping per parameter group, in one read."""
