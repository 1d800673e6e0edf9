"""Where samples are: storage, tar shards and their indices, and the plan of units and rows."""
