"""A lean reinforcement-learning trainer for language models on the public API of ``eapo_kernels``.

Read ``loop.py`` first: it is the whole algorithm from top to bottom. ``python -m trainer --help`` lists the commands.
"""
