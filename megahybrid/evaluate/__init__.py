"""Evaluation of a model: held-out loss, questions, attention, text that it writes."""

from megahybrid.front import callable_as_in_api

callable_as_in_api(__name__)
