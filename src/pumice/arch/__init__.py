"""How a model is laid out: `detect(model)` gives its blocks and sites, `trace` the calls to its blocks."""

from pumice.arch.detect import Arch, detect
from pumice.arch.trace import Call, hidden_of, rebuild, trace

__all__ = ["Arch", "Call", "detect", "hidden_of", "rebuild", "trace"]
