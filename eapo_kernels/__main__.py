"""``python -m eapo_kernels selftest``: see ``selftest``."""

from .selftest import main

if __name__ == "__main__":
    main()
