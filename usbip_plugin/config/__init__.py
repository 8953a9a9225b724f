"""The configuration file: from YAML to typed configuration, with each problem's place in the file, and live reload."""
