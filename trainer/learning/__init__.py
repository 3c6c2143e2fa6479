"""What is learned from a step's answers."""
