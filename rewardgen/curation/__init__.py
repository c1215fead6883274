"""Making training data: choosing and preparing examples."""
