"""Jittered views of an image: how they are made, how a map is seen through them, and the fit to them."""
