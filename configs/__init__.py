"""Configuration: typed schema, composition, validation. Imports no torch."""
