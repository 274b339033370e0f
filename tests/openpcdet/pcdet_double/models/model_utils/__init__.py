"""Blocks of several parts."""
