"""What the larger commands do, one file each; `rewardgen.cli` parses their arguments."""
