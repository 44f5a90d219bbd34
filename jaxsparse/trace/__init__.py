"""Counts, layouts, channels, smaller networks, sparse products and moments of any function of params.

Everything here takes ``apply(params, *args)`` as it is, whatever framework it is written in, and walks through its
jaxpr. Flags go into a lambda; state (batch statistics, dropout keys, the rest of ``nnx.split``) into the arguments:

    trace.multiply_adds(lambda p, x: model.apply({"params": p}, x, train=False), params, x)

Places in a program are named by the line of the user's own code.
"""

from jaxsparse.trace.accounting import LeafProducts, MultiplyAdds, multiply_adds
from jaxsparse.trace.analysis import Site
from jaxsparse.trace.block_products import Use
from jaxsparse.trace.channels import ChannelGroups, channel_groups
from jaxsparse.trace.layout import matrices
from jaxsparse.trace.moments import Moments, Statistic
from jaxsparse.trace.program import Where
from jaxsparse.trace.record import record
from jaxsparse.trace.same import same
from jaxsparse.trace.slim import Slim, SlimApply, closed_channels, slim
from jaxsparse.trace.slim_files import load_slim
from jaxsparse.trace.sparse import SparseApply, SparseReport, sparse_apply

__all__ = [
    "ChannelGroups", "LeafProducts", "Moments", "MultiplyAdds", "Site", "Slim", "SlimApply", "SparseApply",
    "SparseReport", "Statistic", "Use", "Where", "channel_groups", "closed_channels", "load_slim", "matrices",
    "multiply_adds", "record", "same", "slim", "sparse_apply",
]  # fmt: skip
