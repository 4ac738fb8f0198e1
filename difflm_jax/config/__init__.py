"""The config: every key with its default and allowed values, and the ways to set it.

A config file starts from `default_config` or `recommended_config`. `python -m difflm_jax.config` prints
docs/configuration.md. Nothing here trains or loads anything.
"""

from difflm_jax.config.recommended import recommended_config
from difflm_jax.config.schema import default_config

__all__ = ["default_config", "recommended_config"]
