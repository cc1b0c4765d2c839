"""A gated long convolution whose filters are sums of damped oscillations: a constant state, no limit."""
