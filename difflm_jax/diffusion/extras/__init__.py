"""Objectives whose gain was not shown (docs/recipes.md). Each changes the batch or the rule, or adds a teacher."""
