"""Benchmarks through the front door: load generator, peers in process, and the table of ratios.

Nothing here imports torch except `baseline.py`, which is a program of its own.
"""
