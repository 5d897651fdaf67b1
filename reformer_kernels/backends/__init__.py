"""The implementations of the ops: modules with the functions of ``_dispatch.Backend``."""
