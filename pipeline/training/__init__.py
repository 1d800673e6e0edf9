"""Training: the loop of a learned upsampler over shards of images, and linear probes over feature stores.

Nothing here imports Ray: ``pipeline.cluster.train`` runs the loop on a cluster, and a probe is fitted in one process.
"""
