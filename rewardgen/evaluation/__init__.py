"""Held-out evaluation: rewards and witnesses, tables and picture grids."""
