"""What a paged cache takes beyond the pages of its tokens. The snippet carries the function as it is here."""

import math


def spare_blocks(config: object) -> int:
    """Blocks for the sectors of a pool that cannot be filled: each is of layers of one kind alone, full or sliding."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    layers = [kinds.count(kind) for kind in set(kinds)]
    return (len(layers) - 1) * math.ceil(math.lcm(*layers) / len(kinds))
