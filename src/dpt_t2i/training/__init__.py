"""Two short recipes, `probe` and `tune`, over one engine."""
