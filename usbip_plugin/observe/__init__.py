"""Logs, metrics, traces and the HTTP pages of the plugin."""
