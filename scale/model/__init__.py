"""Networks as they are kept and used: checkpoints, the recipes' values, fused layers, sampling."""
