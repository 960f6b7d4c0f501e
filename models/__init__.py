"""Model families, one decoder, and the reading of exactly the slices that a rank needs."""
