"""One unit of work from tar to stored shards, on one device. Knows nothing of Ray."""
