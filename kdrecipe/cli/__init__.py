"""The command line; its modules load what they need when they need it."""
