"""Where rollouts run: the pool contract and its implementations."""
