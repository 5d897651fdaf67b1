"""Attention layers as nn.Modules."""
