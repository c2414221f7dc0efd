"""The search for settings: what to measure next, and how far it has come."""
