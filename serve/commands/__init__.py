"""The commands of the command line that serve over HTTP or measure it, one a module."""
