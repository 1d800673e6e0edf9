"""README's fenced blocks, a folder in which they run as they stand, and its listings of files."""
