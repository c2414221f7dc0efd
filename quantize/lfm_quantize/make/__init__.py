"""Each kind of variant made: one file a kind, from the source graphs to new ones."""
