"""How good samples are: features of images, kept in a cache, and the distances between them."""
