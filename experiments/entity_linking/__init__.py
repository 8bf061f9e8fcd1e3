"""Collective entity linking (DCA): `python -m experiments.entity_linking`."""
