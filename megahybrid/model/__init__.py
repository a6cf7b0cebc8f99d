"""The network: a list of blocks, each given an `AttentionScheme`."""
