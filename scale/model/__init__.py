"""Networks as they are kept and used: recipes, checkpoints, fused layers, sampling."""
