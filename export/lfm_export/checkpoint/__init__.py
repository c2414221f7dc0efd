"""A checkpoint folder read: its settings, every tensor by its place, adapters merged."""
