"""What goes wrong on purpose: each function prepares one rank of a run before it starts."""
