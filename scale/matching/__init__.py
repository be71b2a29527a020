"""Noise pools at full speed: on a GPU, over several processes, and linear assignment."""
