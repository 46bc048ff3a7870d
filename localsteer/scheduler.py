"""The old address of `localsteer.Scheduler`, kept for programs that import it from here."""

import warnings

from .runtime.scheduler import Scheduler, Ticket

__all__ = ["Scheduler", "Ticket"]

warnings.warn("import Scheduler from localsteer", DeprecationWarning, stacklevel=2)
