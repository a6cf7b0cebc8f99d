"""From text to shuffled, split, tokenized datasets."""
