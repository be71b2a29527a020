"""The colours of all figures. Noise and random pairs are a soft blue, data and matched pairs a warm red; they differ in
lightness too, so a figure printed in grey can be read."""

NOISE = RANDOM = "#8fa8c4"
DATA = MATCHED = "#c8441b"
OPTIMAL = "#7a4b94"  # the linear assignment
SEMIDISCRETE = "#1b4f72"
POOLS = {1000: "#e0a458", 10_000: MATCHED, 100_000: "#7a1f3d", 1_000_000: "#2a7f62"}  # by their number of noises

INK = "#2b2f36"  # text, axes, a model's own pairs
NOTE = "#5b6470"  # smaller text, lines between points
PALE = "#d3d9e0"  # grids and backgrounds
