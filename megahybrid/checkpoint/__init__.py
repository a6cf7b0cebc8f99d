"""Layout-free checkpoints: write, verify, publish, restore. Safetensors and JSON, nothing else."""
