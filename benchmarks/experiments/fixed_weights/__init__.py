"""EAPO against four fixed weights of the positive completions, over several seeds. README.md is the
page.
"""
