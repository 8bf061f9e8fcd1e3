"""Compiled C++ sources: how they are built and cached, and dense convolutions on the CPU."""
