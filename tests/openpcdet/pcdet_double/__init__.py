"""A contract double of OpenPCDet: the registries, classes, signatures and loading rules used here.

Written for the tests, with the behaviour of the real package and little else; ``tests/upstream`` compares the
two. All imports in here are relative, so that it can be loaded as ``pcdet``, or under another name beside the
real one.
"""

__version__ = '0.6.0'
