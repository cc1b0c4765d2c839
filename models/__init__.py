"""One architecture, one file: config, module in the chunk form, checkpoint loaders, sources."""
