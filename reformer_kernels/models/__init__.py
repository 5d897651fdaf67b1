"""The Reformer models: configuration, trunk, and what stands on it."""
