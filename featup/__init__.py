"""High-resolution features from any vision backbone (FeatUp, ICLR 2024, arXiv 2403.10516)."""
