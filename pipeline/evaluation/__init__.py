"""Evaluation: upsamplers compared on labelled images, in a table with intervals and in pictures; probes applied.

``evaluate`` runs the parts (probes on labels, views, class activation maps) in one process, without Ray.
``predict`` applies a trained probe to photographs, ``load_predictor`` does so in memory.
"""
