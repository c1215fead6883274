"""The tiny world: generated scenes with known truth, and small trained parts in the full scale's classes."""
