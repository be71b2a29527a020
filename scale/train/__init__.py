"""A training run: one step, the loop, its folder, and when it stops."""
