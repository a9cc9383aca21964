"""One training step, the loop around it, and what a run needs to go on: checkpoints, optimizer, monitor."""
