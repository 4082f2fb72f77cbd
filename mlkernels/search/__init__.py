"""The search for a loss: AM-LFS, which learns the piecewise-linear t and tau while a model is trained.

:class:`LossSearch` holds the distribution of losses and runs its epochs; :class:`Population` trains many models as one;
:class:`Record` is what a search has found, and :func:`plot` shows it.
"""

from .loss_search import LossSearch
from .plotting import plot
from .population import Population, PopulationLoss
from .record import Record, Round

__all__ = ["LossSearch", "Population", "PopulationLoss", "Record", "Round", "plot"]
