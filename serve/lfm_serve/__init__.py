"""Many clients, one model: an engine thread behind an HTTP API."""
