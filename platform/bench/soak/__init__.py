"""A soak in fast motion: everything that users and operators do, at random and at once, and every
answer held against a reference. `python -m loraplex.platform.bench.soak`.
"""
