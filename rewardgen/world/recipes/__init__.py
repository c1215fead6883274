"""How each bundled part of the tiny world is made."""
