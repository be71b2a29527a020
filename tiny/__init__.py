"""What matching does, seen: 2D shapes, one small flow, the pictures."""
