"""One file per Hugging Face class: what it can carry, its config out and in, its tensors.

To add a class, write its file (llama.py is the shortest) and its line in table.py.
"""
