"""The command line: parser.py has every command and flag, and what the exit status says."""
