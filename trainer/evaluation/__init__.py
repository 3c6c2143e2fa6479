"""What a model has learned: evaluation, diversity, reports."""
