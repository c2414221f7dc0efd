"""What lies on disk: each format is written and read in one file."""
