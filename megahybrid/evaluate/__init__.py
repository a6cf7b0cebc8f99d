"""How well a model predicts: held-out loss, loss by position, plain sampling."""
