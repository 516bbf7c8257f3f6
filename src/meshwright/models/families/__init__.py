"""Recipes: one small module per group of families; `registry` maps a config's model_type to its recipe."""
