"""Everything that runs on Ray; nothing else in the project imports it."""
