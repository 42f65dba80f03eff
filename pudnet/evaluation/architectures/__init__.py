"""Accuracy on architectures that no GHN has seen: ``python -m pudnet.evaluation.architectures``.

``measure.py`` computes the records, ``tables.py`` renders them.
"""
