"""Records from any source, box-safe transforms, and the stream of training examples."""
