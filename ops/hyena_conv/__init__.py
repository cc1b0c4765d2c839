"""Hyena's operator of order 2: a long convolution between two gates, channels last."""
