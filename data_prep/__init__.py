"""Data preparation: text becomes shuffled, split, tokenized datasets."""
