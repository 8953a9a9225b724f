"""One node's agent as a process: composition, `run`, `check`, and what it reports."""
