"""The whole model on a CUDA device that is not there: wants torch's CUDA build (.ci/cuda-torch)."""
