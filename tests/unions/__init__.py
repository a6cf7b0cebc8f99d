"""Every member of every union of a model's config, through every place that must know it."""
