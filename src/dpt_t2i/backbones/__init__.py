"""A text-to-image model as a differentiable feature function; one small file a family."""
