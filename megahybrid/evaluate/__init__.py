"""What a model knows and looks at: held-out loss, questions, attention, text that it writes."""
