"""The harness's own cleaning of HellaSwag, where a task file can name it."""

from lm_eval.tasks.hellaswag.utils import process_docs

__all__ = ["process_docs"]
