"""Where a store keeps its data: the interface of a backend, and the backend for a local directory."""
