"""A browser for the tests that need one."""

from browsers import browser

__all__ = ["browser"]
