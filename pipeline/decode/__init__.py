"""Decoding: the bytes of one sample to its image and labels, through one transform. Bytes are never trusted."""
