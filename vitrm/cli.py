"""`python -m vitrm.cli` and `torchrun -m vitrm.cli`: vitrm-train by the name that it had in version 0.1.0."""

import sys

from vitrm.training.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
