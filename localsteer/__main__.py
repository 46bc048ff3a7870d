"""`python -m localsteer` is the program `localsteer`."""

from __future__ import annotations

from localsteer.cli import main

if __name__ == "__main__":
    main()
