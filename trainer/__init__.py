"""A small reinforcement-learning trainer for language models, built on the public API of
``eapo_kernels``.

Start with ``loop.py``: it holds the algorithm from top to bottom. ``python -m trainer --help``
lists the commands.
"""
