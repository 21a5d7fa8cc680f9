"""Models as Hugging Face transformers has them: one mapping file an architecture family, read in both directions."""
