"""The demo model: a tiny Llama and its adapters, trained from nothing by a script in this folder.

It exists so that the tour, the tests and the benchmarks have real weights to serve without
downloading any.  ``train.py`` makes ``assets/``; the other modules need the standard library only.
"""
