"""Rollouts: the engines that sample completions, and their scoring."""
