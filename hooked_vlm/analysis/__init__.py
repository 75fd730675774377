"""Attention rows, statistics and pictures."""
