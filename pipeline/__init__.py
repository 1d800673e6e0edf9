"""Dataset scale: WebDataset shards in, a Zarr store of high-resolution features out."""
