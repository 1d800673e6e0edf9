"""What trained upsamplers learn from: the terms of the loss and the multi-view objective."""
