"""Slow, obvious implementations that the fast ones are held to: loops over positions, no tricks."""
