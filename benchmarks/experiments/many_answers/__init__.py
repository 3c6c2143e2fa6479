"""EAPO beside a constant weight of the same mean, and beside other ways to keep entropy, on a task with
many right answers. README.md is the page.
"""
