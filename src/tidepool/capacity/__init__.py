"""What a divided KV memory holds: capacity in tokens and requests, before and after a model is loaded.

Works on the groups of `tidepool.cache` alone: the planner asks it about models, the plugin about running engines.
"""

from typing import Literal

Partition = Literal["elastic", "fixed"]
"""How memory is divided: extents that change hands, or shares for good."""
