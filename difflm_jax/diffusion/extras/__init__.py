"""Objectives whose gain was not shown (docs/recipes.md): each changes a `NoisyBatch` or adds a teacher."""
