"""Measurements that the README and docs quote; each writes a JSON with the machine beside its numbers."""
