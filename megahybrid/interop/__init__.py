"""Hugging Face out and in: what leaves is run and compared before anyone can use it."""
