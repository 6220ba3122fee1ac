"""The version, in the one place that the package, its metadata and the build read."""

# The base version says which API this is a drop-in for: clients gate on 2.7.1 <= version < 2.8.4.
__version__ = "2.8.3.post100"
