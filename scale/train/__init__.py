"""A training run: one step, the loop, the folder that it resumes from, and when it stops."""
