"""The colours of all figures. Noise and random pairs are a soft blue, data and matched pairs a warm red; they differ in
lightness too, so a figure printed in grey can be read."""

NOISE = RANDOM = "#8fa8c4"
DATA = MATCHED = "#c8441b"
OPTIMAL = "#7a4b94"  # the linear assignment

INK = "#2b2f36"  # text, axes, a model's own pairs
NOTE = "#5b6470"  # smaller text, lines between points
PALE = "#d3d9e0"  # grids and backgrounds
