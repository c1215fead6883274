"""Faces: finding, aligning and embedding them, and the identity metrics. Helpers of `identity` and `matching`."""
