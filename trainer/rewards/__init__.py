"""What a good answer is."""
