"""What a bundle costs on this machine, and whether it is well there: audit, compare, tune, selftest, doctor."""
