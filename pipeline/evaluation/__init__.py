"""Evaluation: upsamplers compared on labelled images, in a table with intervals and in pictures.

``evaluate`` runs the parts (probes on labels, views, class activation maps) in one process, without Ray.
"""
