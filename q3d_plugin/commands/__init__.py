"""The commands of ``q3d``: one module of this package each."""
