"""Training loops: upsamplers over shards, probes over stores."""
