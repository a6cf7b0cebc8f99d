"""Training: a run is built, its stages walked, and what happened written down."""

from megahybrid.front import callable_as_in_api

callable_as_in_api(__name__)
