"""The HTTP side: what clients send, what they get."""
