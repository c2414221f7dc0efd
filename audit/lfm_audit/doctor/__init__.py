"""What matters on this machine, each with what to do about it."""
