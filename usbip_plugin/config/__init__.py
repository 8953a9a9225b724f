"""YAML to typed configuration; every problem is reported with its place in the file; live reload."""
