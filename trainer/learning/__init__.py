"""The update half of a step."""
