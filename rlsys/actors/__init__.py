"""Thin Ray shells: each holds one plain object and forwards calls to it."""
