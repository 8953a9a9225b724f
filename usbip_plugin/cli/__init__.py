"""The command line. parser.py has all commands, flags and exit statuses."""
