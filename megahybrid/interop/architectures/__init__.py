"""One file per Hugging Face class: what it can carry, its config out and in, its tensors.

To add a class, write its file (llama.py is the shortest), its line in table.py and its case in
tests/interop/test_generation.py, whose tokens are compared with those of `sample`.
"""
