"""The commands of ``q3d``, one module each."""
