"""Adapter files: PEFT's format and our own."""
