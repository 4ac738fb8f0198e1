"""Every key of a configuration: its default, what it may be, and the ways to set it.

A config file starts from `default_config`.
"""

from difflm_jax.config.defaults import default_config

__all__ = ["default_config"]
