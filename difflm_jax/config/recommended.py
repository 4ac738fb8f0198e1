"""The attention, objective and decoding that docs/recipes.md found best, in one place for the configs that use them."""

from ml_collections import ConfigDict

from difflm_jax.config.schema import default_config


def recommended_config() -> ConfigDict:
    """Returns the defaults with what keeps the base's knowledge within few steps.

    Prefix attention and the logit shift: the prompt is read as the base reads it, and states predict what they did.
    Mask rates of 0.3 to 1, one per row: a sampler starts from masks alone. Masks next to visible tokens count most
    (CART): a sampler commits them next. `steady` commits the leftmost mask in every pass, and all confident ones.
    """
    config = default_config()
    config.attention = "prefix"
    config.logit_shift = True
    config.mask_rate = "row"
    config.min_mask_probability = 0.3
    config.max_mask_probability = 1.0
    config.loss_tokens = "masked"
    config.loss_weight = "context"
    config.algorithm = "steady"
    return config
