"""Everything learned and discriminative: encodings, transformer, heads, the one matching score, and its file format."""
