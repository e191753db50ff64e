"""Does it work: strategies compared, measures judged."""

import sys

import distal

sys.modules[__name__].__class__ = distal.CallablePackage  # `distal.compare(...)` is the command
