"""The version, as in pyproject.toml."""

# The base version says which API this is a drop-in for: clients gate on 2.7.1 <= version < 2.8.4.
__version__ = "2.8.3.post100"
