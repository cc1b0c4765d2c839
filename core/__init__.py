"""Types every room shares, the registry and the errors. Imports no sibling and no heavy library."""
