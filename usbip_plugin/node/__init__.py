"""The agent of one node as a process: composition, `run`, `check`, metrics and status page."""
