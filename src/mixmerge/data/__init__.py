"""Training data: sources to rows, rows to mixtures. Light: imports no torch; `datasets` only for Hub sources."""
