"""Shipped profiles: YAML recipes found by name."""
