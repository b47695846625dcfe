"""Datasets that come with the plugin."""
