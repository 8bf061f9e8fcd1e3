"""Densities shared out over layers under one budget, and what each layer tolerates."""
