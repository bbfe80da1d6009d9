"""What happens, in order: the main path, the command line and its console."""
