"""What matching, training and the autoencoder cost, measured side by side."""
