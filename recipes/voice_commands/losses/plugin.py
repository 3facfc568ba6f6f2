"""A loss of our own: KL in both directions."""

from kdrecipe import hookimpl
from kdrecipe_plugins.losses.posteriors import PosteriorLoss, TopKOptions, kl


class SymmetricKl(PosteriorLoss):
    """``T^2 * sum over frames of (KL(teacher || student) + KL(student || teacher)) / 2``."""

    name, Config = "symmetric_kl", TopKOptions

    def divergence(self, both):
        return (kl(both.log_p_NK, both.log_q_NK) + kl(both.log_q_NK, both.log_p_NK)) / 2


@hookimpl
def register_losses(register):
    register("symmetric_kl", SymmetricKl)
