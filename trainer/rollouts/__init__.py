"""Answers: engines that sample them, and what methods change about it."""
