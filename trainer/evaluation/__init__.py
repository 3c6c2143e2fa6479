"""Evaluation, measures of diversity, and reports."""
