"""The command line: thin commands over the callable core."""
