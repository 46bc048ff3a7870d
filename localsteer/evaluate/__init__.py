"""The evaluation of steering: conditions with their controls, suites, studies, and their reports.

What judges a single reply lives in `localsteer.verify`; its names are here, too, where they once were.
"""

from localsteer.verify import *  # noqa: F403
