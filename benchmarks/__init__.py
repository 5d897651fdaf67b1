"""Measurements: benchmark cases, providers and the check of a GPU machine."""
