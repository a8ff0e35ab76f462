"""Training several adapters at once over one copy of the frozen base: `train_adapter --jobs plan.yaml`."""
