"""Rewards: one file, one plug-in; the file's name is the name used in experiments."""

if __name__ != "rewardgen.rewards":
    # The same file under two names would become two different classes.
    raise ImportError(f"import this package as 'rewardgen.rewards', not as {__name__!r}")
