"""Evaluation of a model: held-out loss, questions, attention, text that it writes."""
