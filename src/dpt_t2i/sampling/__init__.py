"""From noise to images: self-correction, search over seeds with the model's own score, seeded generation."""
