"""Slow reference implementations, written as plain loops, that the tests compare the fast implementations with."""
