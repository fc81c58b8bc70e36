"""The trainer: its configuration, the loop, checkpoints and logs, and the report of a finished run."""
