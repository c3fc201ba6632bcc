"""Forms: the closed set of what sparse means. Each has an exact reference in plain torch.

    Mask    which weights of a matrix are kept:           W' = W ⊙ keep
    Slim    which units of a site exist at all:           a smaller dense model
    Select  which units run, decided while the model runs: score × cut × unit × scope

Methods return Forms and never see kernels; kernels and the runtime never see methods.
"""

from pumice.forms.cuts import Levels, Sample, Threshold, TopK
from pumice.forms.data import collector, decode, encode
from pumice.forms.mask import Mask
from pumice.forms.scores import (
    Copied,
    Factored,
    Magnitude,
    Predicted,
    Projected,
    PromptNorm,
    RankFusion,
    Static,
    Tokens,
    Uniform,
    between,
)
from pumice.forms.select import Select, drop, live_together
from pumice.forms.slim import Slim

Form = Mask | Slim | Select

__all__ = [
    "Copied",
    "Factored",
    "Form",
    "Levels",
    "Magnitude",
    "Mask",
    "Predicted",
    "Projected",
    "PromptNorm",
    "RankFusion",
    "Sample",
    "Select",
    "Slim",
    "Static",
    "Threshold",
    "Tokens",
    "TopK",
    "Uniform",
    "between",
    "collector",
    "decode",
    "drop",
    "encode",
    "live_together",
]
