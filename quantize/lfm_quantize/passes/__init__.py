"""Graph in, graph out: each rewrite says what it matches and what it leaves alone."""
