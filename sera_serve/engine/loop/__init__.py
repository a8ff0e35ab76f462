"""The step loop of generation: pages of keys and values, the plan of a step, the forward pass, and sampling."""
