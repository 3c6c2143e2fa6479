"""The language model that is trained and the models it comes from or is held against."""
