"""Policies: one file, one plug-in; the file's name is the name used in experiments."""

if __name__ != "rewardgen.policies":
    # The same file under two names would become two different classes.
    raise ImportError(f"import this package as 'rewardgen.policies', not as {__name__!r}")
