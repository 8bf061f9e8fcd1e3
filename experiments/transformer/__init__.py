"""Transformers on images and on text under any constraint, heads and units really removed."""
