"""How good samples are: features of images and the distances between them."""
