"""`python -m rewardgen` is `rewardgen`."""

from rewardgen.cli import main

main()
