"""What matching, training and evaluating cost, measured side by side."""
