"""Building blocks of methods: the chain, links that hold masks, wrappers with latent weights, drop and grow, prune.

A *link* is a sparsity transform: a gradient transformation that stands last in the chain. It sees the params and the
update that the optimizer proposes, and emits the update that lands on its masks. A *wrapper* goes around an
optimizer, which moves other weights than those that the loss sees.
"""

from jaxsparse.transforms.chain import Signal, align_signal, chain, signals_of, stored_momentum
from jaxsparse.transforms.checks import (
    check_budget,
    check_range,
    check_schedule,
    check_steps,
    check_zeros,
    refuse_replicated,
    require_bool,
    require_params,
)
from jaxsparse.transforms.exchange import drop_and_grow, exchange_link, exchanged_masks
from jaxsparse.transforms.landing import land_on_masks, on_update_steps
from jaxsparse.transforms.largest import Largest, n_largest
from jaxsparse.transforms.latent import LatentState, identity_pull, latent, map_latents
from jaxsparse.transforms.layers import Column, Layer, Layers, each, layers_of, on_units
from jaxsparse.transforms.mask_link import MaskState, Watched, dense_start, every, given_masks, mask_link, random_start
from jaxsparse.transforms.masked_latent import MaskedLatentState, masked_latent
from jaxsparse.transforms.protocols import HasGates, HasLatents, HasNotes, SparseState, Wraps, link_states
from jaxsparse.transforms.prune import counts_at, prune_globally, prune_layers, prune_outputs, prune_to
from jaxsparse.transforms.ranking import rank_globally, rank_layers
from jaxsparse.transforms.renewal import Renewal, Renewing, Restarting
from jaxsparse.transforms.scoring import Scoring, scoring
from jaxsparse.transforms.velocity import VelocityState, velocity

__all__ = [
    "Column", "HasGates", "HasLatents", "HasNotes", "Largest", "LatentState", "Layer", "Layers", "MaskState",
    "MaskedLatentState", "Renewal", "Renewing", "Restarting", "Scoring", "Signal", "SparseState", "VelocityState",
    "Watched", "Wraps", "align_signal", "chain", "check_budget", "check_range", "check_schedule", "check_steps",
    "check_zeros", "counts_at", "dense_start", "drop_and_grow", "each", "every", "exchange_link", "exchanged_masks",
    "given_masks", "identity_pull", "land_on_masks", "latent", "layers_of", "link_states", "map_latents",
    "mask_link", "masked_latent", "n_largest", "on_units", "on_update_steps", "prune_globally", "prune_layers",
    "prune_outputs", "prune_to", "random_start", "rank_globally", "rank_layers", "refuse_replicated",
    "require_bool", "require_params", "scoring", "signals_of", "stored_momentum", "velocity",
]  # fmt: skip
