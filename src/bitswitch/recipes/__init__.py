"""Recipes: values only, one YAML file each."""
