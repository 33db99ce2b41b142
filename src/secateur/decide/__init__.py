"""Which experts stay? From loads or scores, limits and a wish to a plan. Pure: numbers in, a value out."""
