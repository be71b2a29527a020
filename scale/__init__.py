"""What a long GPU run adds to dansm.py, a file per thing."""
